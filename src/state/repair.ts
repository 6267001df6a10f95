/**
 * Repair of a state directory. It keeps each damaged original beside it, cuts only what is damaged, and never guesses
 * an owner: a VM whose owner a damaged line may have changed has no owner record afterwards, unless the user names the
 * owner, or the memory directory or the peers prove it. A daemon does not run such a VM, and asks the target of an
 * unfinished move before it goes on.
 */
import { copyFile, readFile, rename } from 'node:fs/promises';
import { join } from 'node:path';
import type { PeerAnswer } from '../agent/peer-claims.js';
import { MigrationError } from '../domain/errors.js';
import type { VmIdentity } from '../domain/host.js';
import { isFinal } from '../domain/job.js';
import { syncDirectory, writeDurably } from '../durable/durable-file.js';
import { encodeFrame, type Piece } from '../durable/frames.js';
import { FileLogStore } from '../durable/log-store.js';
import { seal } from '../durable/sealed.js';
import { FORMAT_FILE, JOBS_LOG, OWNERS_LOG, writeFormat } from '../durable/state-format.js';
import type { OwnerRecord } from '../engine/ports/registry.js';
import { answerLines, type OwnerProof, proveOwner } from './owner-proof.js';
import { readState, type StateRecords, vmsWithoutOwner } from './records.js';

export interface RepairOptions {
  /** VM → the host that owns it, as the user says. */
  readonly owners: ReadonlyMap<string, string>;
  /** Records that the user has inspected, relative to the directory: they get a new checksum as they are. */
  readonly accepted: readonly string[];
  /** For the names of the originals. */
  readonly at: string;
  /** The name of this host, and its peers, which are asked for owners. Null: nobody is asked. */
  readonly hosts: {
    readonly self: string;
    readonly ask: (vms: readonly VmIdentity[]) => Promise<readonly PeerAnswer[]>;
  } | null;
  /** The copy of the owner records in the memory directory of this boot. */
  readonly mirrored: readonly OwnerRecord[];
}

export interface RepairReport {
  /** What was done, one line each. */
  readonly done: readonly string[];
  /** What a person has to do, one line each. */
  readonly left: readonly string[];
  /** What the peers said of VMs whose owner is not known, one line each. */
  readonly answers: readonly string[];
}

/** The caller holds the lock of the directory. */
export async function repairState(directory: string, options: RepairOptions): Promise<RepairReport> {
  const done: string[] = [];
  const left: string[] = [];
  const answers: string[] = [];
  for (const record of options.accepted) done.push(await acceptRecord(directory, record, options.at));
  const state = await readState(directory);
  for (const { record, state: how } of state.findings) {
    if (how !== 'damaged' || /\.log:\d+$/.test(record)) continue;
    const path = join(directory, record);
    if (record === FORMAT_FILE) {
      await setAside(path, options.at);
      await writeFormat(directory);
      done.push(`${record}: made anew; records without a checksum stay refused`);
    } else if (record.startsWith('vms/')) {
      left.push(
        `${record}: inspect it, then: vmctl state repair --accept ${record}; ` +
          'or, if its QEMU has ended, remove the directory',
      );
    } else {
      await setAside(path, options.at);
      done.push(`${record}: set aside`);
    }
  }
  // A log of build 0.1.0 is upgraded by the daemon, which refuses one that is damaged.
  if (state.findings.some(({ record, state: how }) => record === OWNERS_LOG && how === 'old'))
    left.push(`${OWNERS_LOG}: it is of an earlier build; start vmigrated once, then repair what it complains of`);
  else await repairOwners(state, options, { done, left, answers });
  if (await rewriteLog(state, JOBS_LOG, state.jobs, options.at))
    done.push(`${JOBS_LOG}: damaged lines set aside; the jobs that they belong to may be undone or repeated`);
  return { done, left, answers };
}

async function repairOwners(
  state: StateRecords,
  options: RepairOptions,
  { done, left, answers }: { done: string[]; left: string[]; answers: string[] },
): Promise<void> {
  const { directory, owners: pieces, vms } = state;
  const doubtful = doubtfulVms(state);
  const owners = new Map<string, OwnerRecord>();
  for (const piece of pieces) {
    if (piece.kind !== 'record') continue;
    if (piece.record.type === 'swap') owners.set(piece.record.record.vm, piece.record.record);
    else owners.delete(piece.record.vm);
  }
  const extra: Buffer[] = [];
  const append = (record: OwnerRecord, why: string) => {
    extra.push(encodeFrame(JSON.stringify({ type: 'swap', record })));
    done.push(`${record.vm}: belongs to ${record.owner} in epoch ${record.epoch}${why}`);
  };
  const epochOf = (vm: string) => Math.max(owners.get(vm)?.epoch ?? 0, vms.get(vm)?.epoch ?? 0, 1);
  for (const [vm, named] of options.owners) {
    const epoch = Math.max(epochOf(vm), options.mirrored.find((record) => record.vm === vm)?.epoch ?? 0);
    append({ vm, owner: named, epoch, session: null }, ', as you say');
  }
  const unnamed = [...doubtful].filter((vm) => !options.owners.has(vm));
  const mirrored = (vm: string) => options.mirrored.find((record) => record.vm === vm && record.epoch >= epochOf(vm));
  const open = unnamed.filter((vm) => mirrored(vm) === undefined);
  for (const vm of unnamed) {
    const record = mirrored(vm);
    if (record !== undefined) append(record, ', as the copy in the memory directory says');
  }
  const proofs = await askForOwners(state, open, options, { answers, epochOf });
  for (const [vm, { record, why }] of proofs) {
    if (record !== null) {
      append(record, `: ${why}`);
      continue;
    }
    if (owners.has(vm)) extra.push(encodeFrame(JSON.stringify({ type: 'remove', vm, epoch: epochOf(vm) })));
    left.push(
      `${vm}: its owner is not known (${why}). Look where it runs, then: vmctl state repair --owner ${vm}=HOST. ` +
        'An unfinished move asks its target by itself',
    );
  }
  const isDamaged = pieces.some(({ kind }) => kind === 'damaged');
  if (!isDamaged && extra.length === 0) return;
  await rewriteLog(state, OWNERS_LOG, pieces, options.at, extra);
  if (isDamaged) done.push(`${OWNERS_LOG}: damaged lines set aside`);
  await syncDirectory(directory);
}

/** Asks the peers for all these VMs at once. */
async function askForOwners(
  { vms, jobs }: StateRecords,
  names: readonly string[],
  { hosts }: RepairOptions,
  { answers, epochOf }: { answers: string[]; epochOf: (vm: string) => number },
): Promise<Map<string, OwnerProof>> {
  const moving = movingVms(jobs);
  const asked = names.map((name) => ({ name, uuid: vms.get(name)?.spec.uuid ?? '' }));
  const said = hosts === null || names.length === 0 ? [] : await hosts.ask(asked);
  return new Map(
    names.map((vm, index) => {
      answers.push(...answerLines(vm, said, index));
      const state = vms.get(vm)?.state;
      const question = {
        ...{ vm, uuid: vms.get(vm)?.spec.uuid ?? '', self: hosts?.self ?? null, epoch: epochOf(vm) },
        isMoving: moving === null || moving.has(vm),
        isHere: state === 'running' || state === 'paused',
      };
      return [
        vm,
        proveOwner(
          question,
          said.map(({ peer, claims }) => ({ peer, claims: claims?.[index] ?? null })),
        ),
      ];
    }),
  );
}

/** Returns the VMs of unfinished moves; null if the journal is damaged, so that any VM may be in one. */
function movingVms(jobs: StateRecords['jobs']): ReadonlySet<string> | null {
  const moving = new Map<string, string>();
  for (const piece of jobs) {
    if (piece.kind === 'damaged') return null;
    if (piece.kind === 'torn') continue;
    const { record } = piece;
    if (record.type === 'job') moving.set(record.job, record.plan.request.vm);
    else if (record.type === 'state' && isFinal(record.state)) moving.delete(record.job);
  }
  return new Set(moving.values());
}

/** Returns the VMs whose owner is not proven: those that a damaged line may be about, and those without a record. */
function doubtfulVms({ owners, vms, unreadableVms }: StateRecords): Set<string> {
  const doubtful = new Set<string>();
  const known = new Set<string>();
  for (const piece of owners) {
    if (piece.kind === 'record') {
      const vm = piece.record.type === 'swap' ? piece.record.record.vm : piece.record.vm;
      if (piece.record.type === 'swap') known.add(vm);
      doubtful.delete(vm);
    } else if (piece.kind === 'damaged') {
      // The name in a damaged line may itself be damaged, so every VM up to here is in doubt. A later intact line of a
      // VM ends that.
      for (const vm of [...known, ...vms.keys(), ...unreadableVms]) doubtful.add(vm);
    }
  }
  for (const vm of vmsWithoutOwner(vms, owners)) doubtful.add(vm);
  return doubtful;
}

async function rewriteLog(
  { directory }: StateRecords,
  log: string,
  pieces: readonly Piece<unknown>[],
  at: string,
  extra: readonly Buffer[] = [],
): Promise<boolean> {
  if (extra.length === 0 && !pieces.some(({ kind }) => kind === 'damaged')) return false;
  const path = join(directory, log);
  await copyFile(path, asideOf(path, at)).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error;
  });
  const store = await FileLogStore.open(path);
  try {
    const intact = pieces.flatMap((piece) => (piece.kind === 'record' ? [withEnd(piece.frame)] : []));
    if (!(await store.replace(Buffer.concat([...intact, ...extra]))))
      throw new MigrationError('NO_SPACE', `${path}: no space for the repaired log`, { remedy: 'free space there' });
  } finally {
    await store.close();
  }
  return true;
}

function withEnd(frame: Buffer): Buffer {
  return frame.at(-1) === 0x0a ? frame : Buffer.concat([frame.subarray(0, -1), Buffer.from('\n')]);
}

/** Gives a record that the user has inspected a new checksum. Throws USAGE if it is not JSON, or is outside. */
async function acceptRecord(directory: string, record: string, at: string): Promise<string> {
  const state = await readState(directory);
  const found = state.findings.find((finding) => finding.record === record && finding.state === 'damaged');
  if (found === undefined)
    throw new MigrationError('USAGE', `${record} is not a damaged record of ${directory}`, {
      remedy: `name it as "vmctl state check ${directory}" does`,
    });
  const path = join(directory, record);
  let json: unknown;
  try {
    json = JSON.parse(await readFile(path, 'utf8'));
  } catch (cause) {
    throw new MigrationError('USAGE', `${path} is not JSON, so it cannot be accepted`, { cause });
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json))
    throw new MigrationError('USAGE', `${path} is not a record`);
  await copyFile(path, asideOf(path, at));
  await writeDurably(path, seal(json));
  return `${record}: accepted as it is`;
}

async function setAside(path: string, at: string): Promise<void> {
  await rename(path, asideOf(path, at));
}

function asideOf(path: string, at: string): string {
  return `${path}.damaged-${at.replaceAll(/[:.]/g, '-')}`;
}

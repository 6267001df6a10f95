/**
 * Repair of a state directory. It keeps each damaged original beside it, cuts only what is damaged, and never guesses
 * an owner: a VM whose owner a damaged line may have changed has no owner record afterwards, unless the user names the
 * owner. A daemon does not run such a VM, and asks the target of an unfinished move before it goes on.
 */
import { copyFile, readFile, rename } from 'node:fs/promises';
import { join } from 'node:path';
import { MigrationError } from '../domain/errors.js';
import { syncDirectory, writeDurably } from '../durable/durable-file.js';
import { encodeFrame, type Piece } from '../durable/frames.js';
import { FileLogStore } from '../durable/log-store.js';
import { seal } from '../durable/sealed.js';
import { FORMAT_FILE, JOBS_LOG, OWNERS_LOG, writeFormat } from '../durable/state-format.js';
import type { OwnerRecord } from '../engine/ports/registry.js';
import { readState, type StateRecords } from './records.js';

export interface RepairOptions {
  /** VM → the host that owns it, as the user says. */
  readonly owners: ReadonlyMap<string, string>;
  /** Records that the user has inspected, relative to the directory: they get a new checksum as they are. */
  readonly accepted: readonly string[];
  /** For the names of the originals. */
  readonly at: string;
}

export interface RepairReport {
  /** What was done, one line each. */
  readonly done: readonly string[];
  /** What a person has to do, one line each. */
  readonly left: readonly string[];
}

/** The caller holds the lock of the directory. */
export async function repairState(directory: string, options: RepairOptions): Promise<RepairReport> {
  const done: string[] = [];
  const left: string[] = [];
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
  await repairOwners(state, options, { done, left });
  if (await rewriteLog(state, JOBS_LOG, state.jobs, options.at))
    done.push(`${JOBS_LOG}: damaged lines set aside; the jobs that they belong to may be undone or repeated`);
  return { done, left };
}

async function repairOwners(
  state: StateRecords,
  options: RepairOptions,
  { done, left }: { done: string[]; left: string[] },
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
  for (const vm of new Set([...doubtful, ...options.owners.keys()])) {
    const named = options.owners.get(vm);
    const epoch = Math.max(owners.get(vm)?.epoch ?? 0, vms.get(vm)?.epoch ?? 0, 1);
    if (named !== undefined) {
      const record: OwnerRecord = { vm, owner: named, epoch, session: null };
      extra.push(encodeFrame(JSON.stringify({ type: 'swap', record })));
      done.push(`${vm}: belongs to ${named} in epoch ${epoch}, as you say`);
    } else {
      if (owners.has(vm)) extra.push(encodeFrame(JSON.stringify({ type: 'remove', vm, epoch })));
      left.push(
        `${vm}: its owner is not known. Look where it runs, then: vmctl state repair --owner ${vm}=HOST. ` +
          'An unfinished move asks its target by itself',
      );
    }
  }
  const isDamaged = pieces.some(({ kind }) => kind === 'damaged');
  if (!isDamaged && extra.length === 0) return;
  await rewriteLog(state, OWNERS_LOG, pieces, options.at, extra);
  if (isDamaged) done.push(`${OWNERS_LOG}: damaged lines set aside`);
  await syncDirectory(directory);
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
  const own = [...vms].filter(([, { state }]) => state !== 'incoming' && state !== 'stopped');
  for (const [vm] of own) if (!known.has(vm)) doubtful.add(vm);
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

/** The records of a state directory, read one by one, without the daemon and without changing anything. */
import { readFile } from 'node:fs/promises';
import { dirname, join, relative, sep } from 'node:path';
import { TOKEN_RECORD } from '../access/tokens.js';
import { readWanted } from '../agent/fork/pool.js';
import { FORK_RECORD } from '../agent/fork/record.js';
import { IMAGE_RECORD } from '../agent/image/record.js';
import { readMemoryFile } from '../agent/memory/mark.js';
import { SESSION_RECORD } from '../agent/migration/session-store.js';
import { MARKER_RECORD } from '../agent/storage/markers.js';
import { readRecord, type VmRecord } from '../agent/vm/record.js';
import { decodeOwnerChange, type OwnerChange } from '../cluster/file.js';
import { type ErrorJson, MigrationError, toMigrationError } from '../domain/errors.js';
import type { VmState } from '../domain/vm.js';
import { decodePieces, isOldLog, type Piece } from '../durable/frames.js';
import { decodeRecord } from '../durable/record-files.js';
import { isUnsealed } from '../durable/sealed.js';
import {
  FORMAT_FILE,
  HOSTS_FILE,
  JOBS_LOG,
  type LOGS,
  MEMORY_FILE,
  OWNERS_LOG,
  POOL_FILE,
  type RecordKindName,
  readFormat,
  recordPaths,
  VM_RECORD_FILE,
  VMS_FOLDER,
} from '../durable/state-format.js';
import type { JournalEntry } from '../engine/ports/journal.js';
import { decodeJournalEntry } from '../schemas/journal.js';
import { readKnownHosts } from './known-hosts.js';

/**
 * intact · torn: a crash has cut the last line short, which loses nothing · old: of build 0.1.0, without a checksum ·
 * missing: another record needs it · damaged: it is not what vmigrate wrote
 */
export type RecordState = 'intact' | 'torn' | 'old' | 'missing' | 'damaged';

export interface RecordFinding {
  /** Relative to the state directory, for a line of a log with its number. */
  readonly record: string;
  readonly state: RecordState;
  readonly error: ErrorJson | null;
}

export interface StateRecords {
  readonly directory: string;
  readonly findings: readonly RecordFinding[];
  /** By name. Only VMs whose record can be read. */
  readonly vms: ReadonlyMap<string, VmRecord>;
  readonly unreadableVms: readonly string[];
  readonly owners: readonly Piece<OwnerChange>[];
  readonly jobs: readonly Piece<JournalEntry>[];
}

/** The caller holds the lock of the directory. Throws if the directory itself cannot be read. */
export async function readState(directory: string): Promise<StateRecords> {
  const findings: RecordFinding[] = [];
  const vms = new Map<string, VmRecord>();
  const unreadableVms: string[] = [];
  const isUpgraded = await note(findings, FORMAT_FILE, async () => (await readFormat(directory)) !== null);
  for (const path of await recordPaths(directory)) {
    const name = relative(directory, path);
    if (isUpgraded !== true && isUnsealed(await readFile(path, 'utf8'))) {
      findings.push({ record: name, state: 'old', error: null });
      continue;
    }
    const vm = vmOf(name);
    const record = await note(findings, name, () => readRecordFile(directory, name));
    if (vm !== null && record !== undefined) vms.set(vm, record as VmRecord);
    else if (vm !== null) unreadableVms.push(vm);
  }
  const owners = await readLog(directory, OWNERS_LOG, decodeOwnerChange, findings);
  const jobs = await readLog(directory, JOBS_LOG, decodeJournalEntry, findings);
  const isOld = findings.some(({ record, state }) => record === OWNERS_LOG && state === 'old');
  for (const vm of isOld ? [] : vmsWithoutOwner(vms, owners)) {
    const error = new MigrationError('OWNER_CHANGED', `${vm} has no owner record, so it may run on another host`, {
      remedy: 'vmctl state repair DIR',
    });
    findings.push({ record: `${OWNERS_LOG} (${vm})`, state: 'missing', error: error.toJSON() });
  }
  return { directory, findings, vms, unreadableVms, owners, jobs };
}

/**
 * Returns the VMs that are or have been on this host, by their records, and for which there is no owner record. A VM
 * that was starting is not one: its start may have ended before its owner was written, and the next daemon removes it.
 */
export function vmsWithoutOwner(
  vms: ReadonlyMap<string, VmRecord>,
  owners: readonly Piece<OwnerChange>[],
): readonly string[] {
  const owned = new Set<string>();
  for (const piece of owners) {
    if (piece.kind !== 'record') continue;
    if (piece.record.type === 'swap') owned.add(piece.record.record.vm);
    else owned.delete(piece.record.vm);
  }
  const notYet: readonly VmState[] = ['incoming', 'starting', 'stopped'];
  const lives = ([, { state }]: readonly [string, VmRecord]) => !notYet.includes(state);
  return [...vms].filter((vm) => lives(vm) && !owned.has(vm[0])).map(([name]) => name);
}

/** How the record files of each kind are read. The logs have readers of their own. */
const READERS: Readonly<Record<Exclude<RecordKindName, (typeof LOGS)[number]>, (path: string) => Promise<object>>> = {
  sessions: async (path) => decodeRecord(SESSION_RECORD, await readFile(path, 'utf8'), path),
  forks: async (path) => decodeRecord(FORK_RECORD, await readFile(path, 'utf8'), path),
  images: async (path) => decodeRecord(IMAGE_RECORD, await readFile(path, 'utf8'), path),
  'storage-checks': async (path) => decodeRecord(MARKER_RECORD, await readFile(path, 'utf8'), path),
  tokens: async (path) => decodeRecord(TOKEN_RECORD, await readFile(path, 'utf8'), path),
  [VMS_FOLDER]: async (path) => orGone(await readRecord(dirname(path)), path),
  [POOL_FILE]: readWanted,
  [HOSTS_FILE]: async (path) => orGone(await readKnownHosts(dirname(path)), path),
  [MEMORY_FILE]: readMemoryFile,
  [FORMAT_FILE]: async (path) => orGone(await readFormat(dirname(path)), path),
};

/** Reads the record file at `name`, relative to the state directory. Throws CORRUPT, or UNSUPPORTED. */
export async function readRecordFile(directory: string, name: string): Promise<object> {
  const [kind = ''] = name.split(sep);
  const path = join(directory, name);
  const reader = Object.hasOwn(READERS, kind) ? READERS[kind as keyof typeof READERS] : undefined;
  if (reader === undefined) throw new MigrationError('INTERNAL', `${path} is a record of no known kind`);
  return reader(path);
}

function orGone<T>(record: T | null, path: string): T {
  if (record === null) throw new MigrationError('CORRUPT', `${path} is empty or gone`);
  return record;
}

function vmOf(name: string): string | null {
  const [folder, vm, file] = name.split(sep);
  return folder === VMS_FOLDER && file === VM_RECORD_FILE && vm !== undefined ? vm : null;
}

async function readLog<T>(
  directory: string,
  log: string,
  decode: (json: unknown) => T,
  findings: RecordFinding[],
): Promise<readonly Piece<T>[]> {
  const path = join(directory, log);
  const bytes = await readFile(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return Buffer.alloc(0);
    throw error;
  });
  if (isOldLog(bytes)) {
    findings.push({ record: log, state: 'old', error: null });
    return [];
  }
  const pieces = decodePieces(bytes, decode, path);
  const bad = pieces.filter(({ kind }) => kind !== 'record');
  if (bad.length === 0) findings.push({ record: log, state: 'intact', error: null });
  for (const piece of bad) {
    const error = piece.kind === 'damaged' ? piece.error.toJSON() : null;
    findings.push({ record: `${log}:${piece.line}`, state: piece.kind === 'damaged' ? 'damaged' : 'torn', error });
  }
  return pieces;
}

async function note<T>(findings: RecordFinding[], record: string, read: () => Promise<T>): Promise<T | undefined> {
  try {
    const result = await read();
    findings.push({ record, state: 'intact', error: null });
    return result;
  } catch (error) {
    findings.push({ record, state: 'damaged', error: toMigrationError(error).toJSON() });
    return undefined;
  }
}

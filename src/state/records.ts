/** The records of a state directory, read one by one, without the daemon and without changing anything. */
import { readFile } from 'node:fs/promises';
import { dirname, join, relative, sep } from 'node:path';
import { readWanted } from '../agent/fork/pool.js';
import { FORK_RECORD } from '../agent/fork/record.js';
import { IMAGE_RECORD } from '../agent/image/record.js';
import { SESSION_RECORD } from '../agent/migration/session-store.js';
import { readRecord, type VmRecord } from '../agent/vm/record.js';
import { decodeOwnerChange, type OwnerChange } from '../cluster/file.js';
import { type ErrorJson, MigrationError, toMigrationError } from '../domain/errors.js';
import { decodePieces, isOldLog, type Piece } from '../durable/frames.js';
import { decodeRecord } from '../durable/record-files.js';
import { isUnsealed } from '../durable/sealed.js';
import {
  FORMAT_FILE,
  HOSTS_FILE,
  JOBS_LOG,
  OWNERS_LOG,
  POOL_FILE,
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
    const record = await note(findings, name, () => readOne(path, name));
    if (vm !== null && record !== undefined) vms.set(vm, record as VmRecord);
    else if (vm !== null) unreadableVms.push(vm);
  }
  const owners = await readLog(directory, OWNERS_LOG, decodeOwnerChange, findings);
  const jobs = await readLog(directory, JOBS_LOG, decodeJournalEntry, findings);
  return { directory, findings, vms, unreadableVms, owners, jobs };
}

async function readOne(path: string, name: string): Promise<object> {
  const [folder] = name.split(sep);
  switch (folder) {
    case VMS_FOLDER: {
      const record = await readRecord(dirname(path));
      if (record === null) throw new MigrationError('CORRUPT', `${path} is empty`);
      return record;
    }
    case 'sessions':
      return decodeRecord(SESSION_RECORD, await readFile(path, 'utf8'), path);
    case 'forks':
      return decodeRecord(FORK_RECORD, await readFile(path, 'utf8'), path);
    case 'images':
      return decodeRecord(IMAGE_RECORD, await readFile(path, 'utf8'), path);
    case POOL_FILE:
      return readWanted(path);
    case HOSTS_FILE: {
      const hosts = await readKnownHosts(dirname(path));
      if (hosts === null) throw new MigrationError('CORRUPT', `${path} is gone`);
      return hosts;
    }
    default:
      throw new MigrationError('INTERNAL', `${path} is a record of no known kind`);
  }
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

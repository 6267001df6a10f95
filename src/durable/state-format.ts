/**
 * The mark of a state directory, `format`: the id of the directory, and the fact that all its records have checksums.
 *
 * A directory of build 0.1.0 has no mark. Its records are accepted as they are, once: each is written again with its
 * checksum, and then the mark is written. From then on a record without a checksum is damage. A crash in between only
 * repeats the work. A record that cannot be read is left alone, and its reader reports it.
 */
import { randomBytes } from 'node:crypto';
import { readdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { MigrationError } from '../domain/errors.js';
import { parseKept } from '../kit/unknown-keys.js';
import { makeDirectoryDurably, writeDurably } from './durable-file.js';
import { decodeOldLines, encodeFrame, isOldLog } from './frames.js';
import { FileLogStore, fileError } from './log-store.js';
import { checkVersion, corrupt, isUnsealed, seal, unseal } from './sealed.js';

export const FORMAT_FILE = 'format';
export const OWNERS_LOG = 'owners.log';
export const JOBS_LOG = 'jobs.log';
/** The copy of the owner records in the memory directory. */
export const OWNERS_MIRROR = '.owners.log';
export const LOGS = [OWNERS_LOG, JOBS_LOG] as const;
/** Folders with one record a file. */
export const RECORD_FOLDERS = ['sessions', 'forks', 'images', 'storage-checks', 'tokens'] as const;
export type RecordFolder = (typeof RECORD_FOLDERS)[number];
export const POOL_FILE = 'pool.json';
/** Who the other hosts are: for `vmctl state repair`. */
export const HOSTS_FILE = 'hosts.json';
export const VMS_FOLDER = 'vms';
export const VM_RECORD_FILE = 'record.json';
/** Which memory directory belongs to the state directory. */
export const MEMORY_FILE = 'memory-directory.json';
/** Every kind of record, by its file, or by the folder of its files. */
export const RECORD_KINDS = [
  ...RECORD_FOLDERS,
  VMS_FOLDER,
  POOL_FILE,
  HOSTS_FILE,
  MEMORY_FILE,
  FORMAT_FILE,
  ...LOGS,
] as const;
export type RecordKindName = (typeof RECORD_KINDS)[number];

const FORMAT_VERSION = 1;

const schema = z.strictObject({
  version: z.literal(FORMAT_VERSION),
  /** Distinguishes this directory from every other, also from one of the same path on another host. */
  id: z.string().regex(/^[0-9a-f]{32}$/),
  createdAt: z.iso.datetime(),
});
export type StateFormat = z.infer<typeof schema>;

/**
 * Makes the directory if it is missing, brings its records into the present format, and removes what interrupted
 * writes have left. The caller holds the directory's lock.
 */
export async function openState(directory: string): Promise<StateFormat> {
  try {
    await makeDirectoryDurably(directory);
    await removeSideFiles(directory);
    const present = await readFormat(directory);
    if (present !== null) return present;
    for (const path of await recordPaths(directory)) await sealRecord(path);
    for (const log of LOGS) if (!(await rewriteLog(join(directory, log)))) throw noSpace(directory);
    return await writeFormat(directory);
  } catch (error) {
    throw fileError(error, directory);
  }
}

/** Marks the directory as being in the present format, under a new id. */
export async function writeFormat(directory: string): Promise<StateFormat> {
  const id = randomBytes(16).toString('hex');
  const format: StateFormat = { version: FORMAT_VERSION, id, createdAt: new Date().toISOString() };
  await writeDurably(join(directory, FORMAT_FILE), seal(format));
  return format;
}

/** Returns null for a directory of build 0.1.0. Throws CORRUPT for a damaged mark, UNSUPPORTED for a newer one. */
export async function readFormat(directory: string): Promise<StateFormat | null> {
  const path = join(directory, FORMAT_FILE);
  const text = await readIfThere(path);
  if (text === null) return null;
  const json = unseal(text, path);
  checkVersion(json, FORMAT_VERSION, path);
  try {
    return parseKept(schema, json);
  } catch (cause) {
    throw corrupt(`${path} is not the mark of a state directory`, cause);
  }
}

/** Returns the paths of all record files of the directory, the logs excepted. */
export async function recordPaths(directory: string): Promise<string[]> {
  const paths: string[] = [];
  for (const folder of RECORD_FOLDERS) {
    for (const name of await namesIn(join(directory, folder)))
      if (name.endsWith('.json')) paths.push(join(directory, folder, name));
  }
  for (const vm of await namesIn(join(directory, VMS_FOLDER)))
    paths.push(join(directory, VMS_FOLDER, vm, VM_RECORD_FILE));
  paths.push(join(directory, POOL_FILE), join(directory, HOSTS_FILE), join(directory, MEMORY_FILE));
  const isThere = await Promise.all(paths.map(async (path) => (await readIfThere(path)) !== null));
  return paths.filter((_, index) => isThere[index]);
}

/** Removes the side files of writes that a crash has interrupted. They may hold the token of a session. */
export async function removeSideFiles(directory: string): Promise<void> {
  const vms = (await namesIn(join(directory, VMS_FOLDER))).map((name) => join(VMS_FOLDER, name));
  for (const folder of ['', ...RECORD_FOLDERS, ...vms]) {
    for (const name of await namesIn(join(directory, folder)))
      if (name.endsWith('.new')) await rm(join(directory, folder, name), { force: true });
  }
}

async function sealRecord(path: string): Promise<void> {
  const text = await readIfThere(path);
  if (text === null || !isUnsealed(text)) return;
  const json = JSON.parse(text) as object;
  // The list of wanted waiting sets was an array, which has no place for a checksum.
  await writeDurably(path, seal(Array.isArray(json) ? { version: 1, wanted: json } : json));
}

/** Returns false if there is no space for the rewritten log; then the old one is untouched. */
async function rewriteLog(path: string): Promise<boolean> {
  if ((await readIfThere(path)) === null) return true;
  const store = await FileLogStore.open(path);
  try {
    const bytes = await store.read();
    if (!isOldLog(bytes)) return true;
    return await store.replace(Buffer.concat(decodeOldLines(bytes, path).map(encodeFrame)));
  } finally {
    await store.close();
  }
}

async function namesIn(path: string): Promise<string[]> {
  try {
    return (await readdir(path)).sort();
  } catch (error) {
    if (isAbsence(error)) return [];
    throw error;
  }
}

async function readIfThere(path: string): Promise<string | null> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if (isAbsence(error)) return null;
    throw error;
  }
}

function isAbsence(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException;
  return code === 'ENOENT' || code === 'ENOTDIR';
}

function noSpace(directory: string): MigrationError {
  return new MigrationError('NO_SPACE', `${directory}: no space to give the logs of the earlier build checksums`, {
    remedy: 'free space there, then start vmigrated again',
  });
}

/**
 * The mark that ties a memory directory to a state directory. The state directory names the memory directory, the id
 * of its mark and the boot (`memory-directory.json`); the memory directory holds the same id (`.owner`). It is the id
 * of the state directory itself; a mark that an earlier build has made keeps its own until the memory is gone. So a
 * daemon with another state directory cannot take memory for its own and remove it. And a daemon that sees an empty
 * directory in place of its memory (another mount namespace, a mount on top) does not believe that its VMs have
 * vanished.
 *
 * Memory is gone after a reboot, so a directory without a mark is then accepted. Directories of build 0.1.0 have no
 * mark. One without a mark, or whose state directory is from another boot (it may be a copy that came back), is
 * accepted if the state directory knows all VMs and images in it. The state's side is written before the
 * memory's side and once more after it (`isMade`), so a crash in between is not taken for a foreign directory.
 */
import { readdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import { writeDurably, writeWhole } from '../../durable/durable-file.js';
import { corrupt, seal, unseal } from '../../durable/sealed.js';
import { MEMORY_FILE, OWNERS_MIRROR } from '../../durable/state-format.js';
import { readRecord } from '../vm/record.js';

export const MARK_FILE = '.owner';
const IMAGES = '.images';
/** The daemon's own files in its memory directory. No guest's memory is in them. */
export const OF_NO_GUEST: ReadonlySet<string> = new Set([MARK_FILE, OWNERS_MIRROR, `${OWNERS_MIRROR}.new`]);

const id = z.string().regex(/^[0-9a-f]{32}$/);
// Newer builds may add keys.
const stateSide = z.object({ version: z.literal(1), id, bootId: z.string(), ramDir: z.string(), isMade: z.boolean() });
const memorySide = z.object({ version: z.literal(1), id, stateDir: z.string() });

export interface MarkPlaces {
  readonly stateDir: string;
  /** The id of the state directory. */
  readonly stateId: string;
  readonly ramDir: string;
  /** The kernel's boot id. */
  readonly bootId: string;
}

/** Reads the state directory's side, for checks. Throws CORRUPT. */
export async function readMemoryFile(path: string): Promise<object> {
  const state = await readSide(path, stateSide);
  if (state === null) throw corrupt(`${path} is gone`);
  return state;
}

/** Returns the memory directory that the last start on this state directory used during this boot, or null. */
export async function memoryDirectoryInUse(places: Pick<MarkPlaces, 'stateDir' | 'bootId'>): Promise<string | null> {
  const state = await readSide(join(places.stateDir, MEMORY_FILE), stateSide);
  return state?.bootId === places.bootId ? state.ramDir : null;
}

/**
 * Ties the directories, or checks that they are tied. Both exist, belong to this daemon, and the state directory is
 * locked. Throws CONFLICT if the memory directory is not the one of this state directory, CORRUPT if a side of the mark
 * cannot be read. Changes nothing if it throws. Idempotent. Returns the id of the mark.
 */
export async function tieMemoryDirectory(places: MarkPlaces): Promise<string> {
  const { stateDir, stateId, ramDir, bootId } = places;
  const state = await readSide(join(stateDir, MEMORY_FILE), stateSide);
  const memory = await readSide(join(ramDir, MARK_FILE), memorySide);
  if (memory !== null && memory.id !== state?.id && memory.id !== stateId) throw foreign(ramDir, memory.stateDir);
  const isThisBoot = state?.bootId === bootId && state.isMade;
  if (memory === null) {
    const missing = isThisBoot ? await vmsWithMemory(stateDir) : [];
    if (missing.length > 0) throw elsewhere(missing, state?.ramDir ?? ramDir, places);
    await refuseUnknownContent(places);
    // Without a mark nobody knows whose copy of the owner records it is.
    await rm(join(ramDir, OWNERS_MIRROR), { force: true });
  } else if (!isThisBoot || memory.id !== state.id) {
    await refuseUnknownContent(places);
  } else if (state.ramDir === ramDir) return memory.id;
  const made = { version: 1 as const, id: memory?.id ?? stateId, bootId, ramDir };
  await writeDurably(join(stateDir, MEMORY_FILE), seal({ ...made, isMade: false }));
  await writeWhole(join(ramDir, MARK_FILE), seal({ version: 1, id: made.id, stateDir }));
  await writeDurably(join(stateDir, MEMORY_FILE), seal({ ...made, isMade: true }));
  return made.id;
}

/** Returns the VMs whose memory must be in the memory directory. One whose record cannot be read is among them. */
export async function vmsWithMemory(stateDir: string): Promise<string[]> {
  const names: string[] = [];
  for (const name of await namesIn(join(stateDir, 'vms'))) {
    const hasMemory = await readRecord(join(stateDir, 'vms', name)).then(
      (record) => record !== null && record.state !== 'stopped' && record.spec.memory.backing !== 'private',
      () => true,
    );
    if (hasMemory) names.push(name);
  }
  return names;
}

async function refuseUnknownContent({ stateDir, ramDir }: MarkPlaces): Promise<void> {
  // A side file of a mark that was being written.
  await rm(join(ramDir, `${MARK_FILE}.new`), { force: true });
  const vms = new Set(await namesIn(join(stateDir, 'vms')));
  const images = new Set((await namesIn(join(stateDir, 'images'))).map((name) => name.replace(/\.json$/, '')));
  const unknown = [
    ...(await namesIn(ramDir)).filter((name) => !OF_NO_GUEST.has(name) && name !== IMAGES && !vms.has(name)),
    ...(await namesIn(join(ramDir, IMAGES))).filter((name) => !images.has(name)).map((name) => join(IMAGES, name)),
  ];
  const [first] = unknown;
  if (first === undefined) return;
  throw new MigrationError('CONFLICT', `${join(ramDir, first)} belongs to no VM or image recorded in ${stateDir}`, {
    remedy: `name the right --state or another --ram-dir; if no QEMU uses it any more: rm -r ${join(ramDir, first)}`,
  });
}

async function readSide<T extends z.ZodRawShape>(
  path: string,
  schema: z.ZodObject<T>,
): Promise<z.output<z.ZodObject<T>> | null> {
  const text = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return null;
    throw error;
  });
  if (text === null) return null;
  try {
    // Marks of the build before have no checksum.
    return text.includes('"seal"') ? schema.parse(unseal(text, path)) : schema.strict().parse(JSON.parse(text));
  } catch (cause) {
    throw new MigrationError('CORRUPT', `${path} is not the mark of a memory directory`, {
      remedy: `make sure that no other vmigrated uses the directory, then rm ${path} and start again`,
      cause,
    });
  }
}

async function namesIn(path: string): Promise<string[]> {
  return readdir(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw error;
  });
}

function foreign(ramDir: string, stateDir: string): MigrationError {
  return new MigrationError('CONFLICT', `${ramDir} holds the memory of the daemon with the state in ${stateDir}`, {
    remedy:
      `start with --state ${stateDir}, or name another --ram-dir; ` +
      `if that daemon and its QEMUs have ended for good: rm -r ${ramDir}`,
  });
}

function elsewhere(names: readonly string[], before: string, { ramDir, stateDir }: MarkPlaces): MigrationError {
  const where = before === ramDir ? 'but is not there now: a mount may hide it' : `not in ${ramDir}`;
  return new MigrationError('CONFLICT', `the memory of ${names.join(', ')} was in ${before}, ${where}`, {
    remedy:
      `start vmigrated with --ram-dir ${before} in the mount namespace of before; ` +
      `if those QEMUs have ended for good: rm ${join(stateDir, MEMORY_FILE)}`,
  });
}

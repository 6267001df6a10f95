/**
 * The tmpfs that a daemon mounts for the memory of its guests. It stays when the daemon ends. Its size is half of the
 * host's memory, or what the daemon may promise by its configuration; a start with another configuration changes it. It
 * never gets smaller than the files in it can become: a guest that finds no room for a page of its own dies.
 */
import { execFile } from 'node:child_process';
import { lstat, readdir, readFile, stat, statfs } from 'node:fs/promises';
import { totalmem } from 'node:os';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { OF_NO_GUEST } from './mark.js';

const MOUNT_MS_MAX = 10_000;
const SOURCE = 'vmigrate';
const FLAGS = 'nosuid,nodev,noexec';
const STAT_BLOCK_BYTES = 512;
const PAGE_BYTES = 4096;
const DEFAULT_SHARE = 0.5;
/** Beside guest memory there are its presence maps, which are far smaller than this part of it. */
const MAPS_SHARE = 1 / 64;
const MAPS_BYTES_MIN = 16 * 1024 * 1024;
const execFileAsync = promisify(execFile);

export interface TmpfsSizes {
  /** `memory.budget` of the configuration. */
  readonly budgetBytes?: number | undefined;
  /** `clones.budget`: what a clone has written lies here while the clone moves. Default: half of the host's memory. */
  readonly cloneBudgetBytes?: number | undefined;
}

/**
 * Mounts a tmpfs on the directory if nothing is mounted and no memory lies there. Returns why there is none, for a
 * person, or null. Rejects only if the directory cannot be read.
 */
export async function mountOwnTmpfs(directory: string, sizes: TmpfsSizes): Promise<string | null> {
  const isMount = (await stat(directory)).dev !== (await stat(dirname(directory))).dev;
  if (isMount) return null;
  if ((await readdir(directory)).some((name) => !OF_NO_GUEST.has(name)))
    return `no tmpfs is mounted on ${directory}, because it was refused before memory came there`;
  const options = `mode=0700,size=${wantedBytes(sizes)},${FLAGS}`;
  return mount(['-t', 'tmpfs', '-o', options, SOURCE, directory], `no tmpfs can be mounted on ${directory}`);
}

function wantedBytes({ budgetBytes, cloneBudgetBytes }: TmpfsSizes): number {
  const half = totalmem() * DEFAULT_SHARE;
  if (budgetBytes === undefined) return wholePages(half);
  const mapsBytes = Math.max(MAPS_BYTES_MIN, budgetBytes * MAPS_SHARE);
  return wholePages(budgetBytes + mapsBytes + (cloneBudgetBytes ?? half));
}

/**
 * Gives the tmpfs of this or an earlier start the size that the configuration has now. A mount of somebody else is left
 * as it is. The caller has found the directory to be tied to its state directory, so no other daemon uses it. Returns
 * why the size is still another, for a person, or null. Rejects only if the directory cannot be read.
 */
export async function resizeOwnTmpfs(directory: string, sizes: TmpfsSizes): Promise<string | null> {
  if (!(await isOurs(directory))) return null;
  const { blocks, bsize } = await statfs(directory);
  const sizeBytes = blocks * bsize;
  const floorBytes = await promisedBytes(directory);
  // Without a budget somebody may have made it larger, as the remedy for too little room says.
  const keptBytes = sizes.budgetBytes === undefined ? sizeBytes : 0;
  const newBytes = Math.max(wantedBytes(sizes), wholePages(floorBytes), keptBytes);
  if (newBytes === sizeBytes) return null;
  const options = `remount,size=${newBytes},${FLAGS}`;
  return mount(['-o', options, directory], `the tmpfs on ${directory} cannot be given ${newBytes} bytes`);
}

/** The bytes that the files below the directory have, or may get without growing. */
async function promisedBytes(directory: string): Promise<number> {
  const files = new Map<number, number>();
  const visit = async (path: string): Promise<void> => {
    for (const entry of await readdir(path, { withFileTypes: true })) {
      const each = join(path, entry.name);
      if (entry.isDirectory()) await visit(each);
      const { ino, size, blocks } = await lstat(each);
      // A file of two names counts once.
      files.set(ino, Math.max(size, blocks * STAT_BLOCK_BYTES));
    }
  };
  await visit(directory);
  return [...files.values()].reduce((bytes, each) => bytes + each, 0);
}

async function isOurs(directory: string): Promise<boolean> {
  const mounts = (await readFile('/proc/self/mounts', 'utf8')).split('\n').map((line) => line.split(' '));
  const [source, , type] = mounts.findLast(([, path]) => path === directory) ?? [];
  return source === SOURCE && type === 'tmpfs';
}

async function mount(args: readonly string[], problem: string): Promise<string | null> {
  return execFileAsync('mount', [...args], { timeout: MOUNT_MS_MAX }).then(
    () => null,
    (error: Error) => `${problem}: ${error.message.trim().split('\n').at(-1)}`,
  );
}

function wholePages(bytes: number): number {
  return Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES;
}

/**
 * The memory directory of a daemon whose configuration names none: `/run/vmigrate/NAME/ram`, below a directory that
 * only root may write to. /run itself is often too small, so the daemon has a tmpfs of its own there (own-tmpfs.ts).
 */
import { lstat, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { openOwnDirectory } from '../../kit/own-directory.js';
import { MARK_FILE, memoryDirectoryInUse, vmsWithMemory } from './mark.js';
import { mountOwnTmpfs, type TmpfsSizes } from './own-tmpfs.js';

export interface DefaultPlaces {
  readonly host: string;
  readonly stateDir: string;
  /** The kernel's boot id. */
  readonly bootId: string;
  readonly sizes: TmpfsSizes;
  /** The parent of the daemons' directories; another one in tests. */
  readonly root?: string;
  /** The directory of build 0.1.0; another one in tests. */
  readonly oldDefault?: string;
}

export interface MemoryDirectory {
  readonly path: string;
  /** Why the daemon has no tmpfs of its own there, for a person. Null if there is nothing to say. */
  readonly problem: string | null;
}

/**
 * Returns the directory that was used during this boot, or that of build 0.1.0 while it holds memory of this daemon's
 * VMs or images, or the default, which is made. Its caller checks and opens it.
 */
export async function defaultMemoryDirectory(places: DefaultPlaces): Promise<MemoryDirectory> {
  const { host, stateDir, sizes, root = '/run/vmigrate', oldDefault = `/dev/shm/vmigrate-${host}` } = places;
  const own = join(root, host, 'ram');
  const inUse = await memoryDirectoryInUse(places);
  const path = inUse ?? ((await holdsOurMemory(oldDefault, stateDir)) ? oldDefault : own);
  if (path !== own) return { path, problem: null };
  await (await openOwnDirectory(path, true)).close();
  // Where the mark is missing, the memory of this boot is elsewhere. The start is refused then, and mounts nothing.
  const isMarkThere = (await lstat(join(path, MARK_FILE)).catch(() => null)) !== null;
  if (inUse !== null && !isMarkThere && (await vmsWithMemory(stateDir)).length > 0) return { path, problem: null };
  return { path, problem: await mountOwnTmpfs(path, sizes) };
}

async function holdsOurMemory(directory: string, stateDir: string): Promise<boolean> {
  const found = await lstat(directory).catch(() => null);
  if (found === null || !found.isDirectory() || found.uid !== process.geteuid?.()) return false;
  const namesIn = (path: string) => readdir(path).catch(() => []);
  const vms = new Set(await namesIn(join(stateDir, 'vms')));
  const images = await namesIn(join(directory, '.images'));
  return images.length > 0 || (await namesIn(directory)).some((name) => vms.has(name));
}

/**
 * The memory directory of a daemon whose configuration names none: `/run/vmigrate/NAME/ram`, below a directory that
 * only root may write to. /run itself is often too small, so the daemon mounts a tmpfs of its own there, of half of the
 * host's memory, which stays when the daemon ends.
 */
import { execFile } from 'node:child_process';
import { lstat, readdir, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import type { Log } from '../../kit/log.js';
import { openOwnDirectory } from '../../kit/own-directory.js';
import { memoryDirectoryInUse } from './mark.js';

const MOUNT_MS_MAX = 10_000;
const execFileAsync = promisify(execFile);

export interface DefaultPlaces {
  readonly host: string;
  readonly stateDir: string;
  /** The kernel's boot id. */
  readonly bootId: string;
  /** The parent of the daemons' directories; another one in tests. */
  readonly root?: string;
  /** The directory of build 0.1.0; another one in tests. */
  readonly oldDefault?: string;
}

/**
 * Returns the directory that was used during this boot, or that of build 0.1.0 while it holds memory of this daemon's
 * VMs or images, or the default, which is made. Its caller checks and opens it.
 */
export async function defaultMemoryDirectory(places: DefaultPlaces, log: Log): Promise<string> {
  const { host, stateDir, root = '/run/vmigrate', oldDefault = `/dev/shm/vmigrate-${host}` } = places;
  const inUse = await memoryDirectoryInUse(places);
  if (inUse !== null) return inUse;
  if (await holdsOurMemory(oldDefault, stateDir)) return oldDefault;
  const directory = join(root, host, 'ram');
  await (await openOwnDirectory(directory, true)).close();
  await mountOwn(directory, log);
  return directory;
}

async function holdsOurMemory(directory: string, stateDir: string): Promise<boolean> {
  const found = await lstat(directory).catch(() => null);
  if (found === null || !found.isDirectory() || found.uid !== process.geteuid?.()) return false;
  const namesIn = (path: string) => readdir(path).catch(() => []);
  const vms = new Set(await namesIn(join(stateDir, 'vms')));
  const images = await namesIn(join(directory, '.images'));
  return images.length > 0 || (await namesIn(directory)).some((name) => vms.has(name));
}

/** Mounts a tmpfs on the directory if nothing is mounted and nothing lies there. Where it may not, it says so. */
async function mountOwn(directory: string, log: Log): Promise<void> {
  const isMount = (await stat(directory)).dev !== (await stat(dirname(directory))).dev;
  if (isMount || (await readdir(directory)).length > 0) return;
  const command = ['-t', 'tmpfs', '-o', 'mode=0700,nosuid,nodev,noexec', 'vmigrate', directory];
  await execFileAsync('mount', command, { timeout: MOUNT_MS_MAX }).catch((error: Error) => {
    log.warn(
      { directory, error: error.message },
      'no tmpfs can be mounted for the memory of guests: the file system that is there is used, which may be small',
    );
  });
}

import { constants } from 'node:fs';
import { type FileHandle, link, open, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { MigrationError } from '../domain/errors.js';
import { fileError } from './log-store.js';
import { withReserve } from './reserve.js';

/** Locks an open file for the life of its descriptor (flock). Returns false if another descriptor holds the lock. */
export type LockFile = (descriptor: number) => boolean;

/**
 * Ensures that one process at a time uses a directory. Two locks are taken, and held for life:
 *
 * - flock on the file `lock`. It excludes every other process, also one in another container that cannot see this
 *   process, and one on another host that has the directory over NFS. It ends with its holder, however that ends.
 * - the numbered lock of build 0.1.0, so that a daemon of that build is excluded, too. The lock file with the highest
 *   number counts. It names its holder by pid, start time and boot, so that a reused pid does not look like the holder.
 *   A process that finds the holder dead takes the next number with link(2), which only one process can do. The file
 *   with the highest number is never deleted, not even when the lock is released. So a slow process cannot take a
 *   number used before without seeing a higher one.
 */
export class DirectoryLock {
  readonly #path: string;
  readonly #file: FileHandle;

  private constructor(path: string, file: FileHandle) {
    this.#path = path;
    this.#file = file;
  }

  /** Throws CONFLICT, naming the holder, if another process uses the directory. The directory exists. */
  static async take(directory: string, lockFile: LockFile): Promise<DirectoryLock> {
    try {
      const file = await lockedFile(directory, lockFile);
      try {
        return new DirectoryLock(await takeNumber(directory), file);
      } catch (error) {
        await file.close();
        throw error;
      }
    } catch (error) {
      throw fileError(error, directory);
    }
  }

  async giveBack(): Promise<void> {
    try {
      await withReserve(this.#path, () => writeFile(`${this.#path}-free`, '{}', { mode: 0o600 }));
      await rename(`${this.#path}-free`, this.#path);
    } finally {
      await this.#file.close();
    }
  }
}

async function lockedFile(directory: string, lockFile: LockFile): Promise<FileHandle> {
  const path = join(directory, 'lock');
  const file = await open(path, constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW, 0o600);
  try {
    if (!lockFile(file.fd)) throw inUse(directory, await holderText(path));
    const text = `process ${process.pid} on ${hostname()}, since ${new Date().toISOString()}\n`;
    await file.truncate(0);
    await withReserve(path, () => file.write(text, 0));
    return file;
  } catch (error) {
    await file.close();
    throw error;
  }
}

/** The text is for people: the lock itself is the kernel's. */
async function holderText(path: string): Promise<string> {
  const text = await readFile(path, 'utf8').catch(() => '');
  return text.slice(0, 200).trim() || 'another process';
}

function inUse(directory: string, holder: string): MigrationError {
  return new MigrationError('CONFLICT', `${directory} is in use by ${holder}`, {
    remedy: 'each vmigrated needs its own state directory: stop the other daemon, or change --state',
  });
}

async function takeNumber(directory: string): Promise<string> {
  const holder = await describeProcess(process.pid);
  const draft = join(directory, `lock-draft.${process.pid}.${Math.trunc(performance.now() * 1000)}`);
  try {
    await withReserve(draft, () => writeFile(draft, JSON.stringify(holder), { mode: 0o600 }));
    for (;;) {
      const numbers = await lockNumbers(directory);
      const highest = numbers.at(-1) ?? 0;
      if (highest > 0) await refuseIfHeld(directory, highest);
      const mine = highest + 1;
      const path = join(directory, `lock.${mine}`);
      if (!(await linked(draft, path))) continue;
      const after = await lockNumbers(directory);
      if (after.at(-1) !== mine) {
        await rm(path, { force: true });
        continue;
      }
      for (const number of after.slice(0, -1)) await rm(join(directory, `lock.${number}`), { force: true });
      return path;
    }
  } finally {
    await rm(draft, { force: true });
  }
}

interface Holder {
  readonly pid: number;
  readonly startTicks: string;
  readonly boot: string;
}

async function lockNumbers(directory: string): Promise<number[]> {
  const names = await readdir(directory);
  const numbers = names.flatMap((name) => {
    const match = /^lock\.(\d{1,15})$/.exec(name);
    return match === null ? [] : [Number(match[1])];
  });
  return numbers.sort((left, right) => left - right);
}

async function linked(from: string, to: string): Promise<boolean> {
  try {
    await link(from, to);
    return true;
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'EEXIST') return false;
    throw error;
  }
}

async function refuseIfHeld(directory: string, number: number): Promise<void> {
  let text: string;
  try {
    text = await readFile(join(directory, `lock.${number}`), 'utf8');
  } catch (error) {
    // A process that holds a higher number by now has deleted the file; the next round sees that number.
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return;
    throw error;
  }
  const holder = parseHolder(text);
  if (holder === null) return;
  const present = await describeProcess(holder.pid).catch(() => null);
  if (present === null || present.startTicks !== holder.startTicks || present.boot !== holder.boot) return;
  throw inUse(directory, `process ${holder.pid}`);
}

/** Returns the holder, or null if the lock was released or a crash of the machine has lost the file's text. */
function parseHolder(text: string): Holder | null {
  try {
    const json: unknown = JSON.parse(text);
    if (typeof json !== 'object' || json === null) return null;
    const { pid, startTicks, boot } = json as Record<string, unknown>;
    const isHolder = typeof pid === 'number' && typeof startTicks === 'string' && typeof boot === 'string';
    return isHolder ? { pid, startTicks, boot } : null;
  } catch {
    return null;
  }
}

async function describeProcess(pid: number): Promise<Holder> {
  const boot = (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8');
  // The name in parentheses may contain spaces. The start time is field 22, the 20th after the name.
  const startTicks = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19] ?? '';
  return { pid, startTicks, boot };
}

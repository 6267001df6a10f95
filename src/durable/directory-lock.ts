import { link, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { MigrationError } from '../domain/errors.js';
import { fileError } from './log-store.js';
import { withReserve } from './reserve.js';

/**
 * Ensures that one daemon at a time uses a directory. The lock file with the highest number counts. It names its holder
 * by pid, start time and boot, so that a reused pid does not look like the holder. A process that finds the holder dead
 * takes the next number with link(2), which only one process can do. The file with the highest number is never deleted,
 * not even when the lock is released. So a slow process cannot take a number used before without seeing a higher one.
 */
export class DirectoryLock {
  readonly #path: string;

  private constructor(path: string) {
    this.#path = path;
  }

  static async take(directory: string): Promise<DirectoryLock> {
    const holder = await describeProcess(process.pid);
    const draft = join(directory, `lock-draft.${process.pid}.${Math.trunc(performance.now() * 1000)}`);
    try {
      await withReserve(draft, () => writeFile(draft, JSON.stringify(holder), { mode: 0o600 }));
      for (;;) {
        const numbers = await lockNumbers(directory);
        const highest = numbers.at(-1) ?? 0;
        if (highest > 0) await refuseIfHeld(directory, highest);
        const mine = highest + 1;
        if (!(await linked(draft, join(directory, `lock.${mine}`)))) continue;
        const after = await lockNumbers(directory);
        if (after.at(-1) !== mine) {
          await rm(join(directory, `lock.${mine}`), { force: true });
          continue;
        }
        for (const number of after.slice(0, -1)) await rm(join(directory, `lock.${number}`), { force: true });
        return new DirectoryLock(join(directory, `lock.${mine}`));
      }
    } catch (error) {
      throw fileError(error, directory);
    } finally {
      await rm(draft, { force: true });
    }
  }

  async giveBack(): Promise<void> {
    await withReserve(this.#path, () => writeFile(`${this.#path}-free`, '{}', { mode: 0o600 }));
    await rename(`${this.#path}-free`, this.#path);
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
  throw new MigrationError('CONFLICT', `${directory} is in use by process ${holder.pid}`, {
    remedy: 'each vmigrated needs its own state directory: stop the other daemon, or change --state',
  });
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

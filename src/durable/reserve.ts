/**
 * Room on the state disk for what must not fail: the end of a VM, the outcome of a commit, the start of a daemon. It is
 * a file of random bytes, which no file system stores in less. When a write finds the disk full, the file is
 * removed and the write repeated. The file is made again when there is room. Until then the host refuses new work.
 *
 * Writers do not know the reserve: they pass their work to `withReserve`, which finds it by the path of their file.
 */
import { randomBytes } from 'node:crypto';
import { open, rename, rm, stat, statfs } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { MigrationError } from '../domain/errors.js';
import { STATE_ROOM_BYTES } from '../domain/host.js';

export const RESERVE_BYTES = 4 * 1024 * 1024;
const RESERVE_FILE = 'reserve';
const RESTORE_EVERY_MS = 5_000;
const FULL: ReadonlySet<unknown> = new Set(['ENOSPC', 'EDQUOT']);

export class Reserve {
  static readonly #all = new Map<string, Reserve>();
  readonly #directory: string;
  readonly #path: string;
  #restoring: Promise<boolean> | null = null;
  #timer: NodeJS.Timeout | null = null;

  private constructor(directory: string) {
    this.#directory = directory;
    this.#path = join(directory, RESERVE_FILE);
  }

  /** Makes the reserve of a directory known to `withReserve`. The directory need not have one yet; see `restore`. */
  static of(path: string): Reserve {
    const directory = resolve(path);
    const known = Reserve.#all.get(directory);
    if (known !== undefined) return known;
    const reserve = new Reserve(directory);
    Reserve.#all.set(directory, reserve);
    return reserve;
  }

  /** Returns the reserve of the directory that the path is in, or null. */
  static for(path: string): Reserve | null {
    const whole = resolve(path);
    for (const [directory, reserve] of Reserve.#all) if (whole.startsWith(`${directory}/`)) return reserve;
    return null;
  }

  /** Idempotent. */
  close(): void {
    if (this.#timer !== null) clearInterval(this.#timer);
    this.#timer = null;
    Reserve.#all.delete(this.#directory);
  }

  /** Makes the file if it is missing and there is room. Returns whether it is there. Never rejects. */
  restore(): Promise<boolean> {
    this.#restoring ??= this.#restore()
      .catch(() => false)
      .finally(() => {
        this.#restoring = null;
      });
    return this.#restoring;
  }

  /** Removes the file, so that its room can be used. Returns whether there was one. Never rejects. */
  async giveUp(): Promise<boolean> {
    await this.#restoring;
    const had = await rm(this.#path).then(
      () => true,
      () => false,
    );
    this.#timer ??= setInterval(() => {
      void this.restore().then((isThere) => {
        if (!isThere || this.#timer === null) return;
        clearInterval(this.#timer);
        this.#timer = null;
      });
    }, RESTORE_EVERY_MS).unref();
    return had;
  }

  /** Returns the room for new work: none while the reserve is missing. */
  async freeBytes(): Promise<number> {
    if (!(await this.restore())) return 0;
    return roomIn(this.#directory);
  }

  /** Throws NO_SPACE unless there is room for new work. */
  async checkRoom(): Promise<void> {
    const freeBytes = await this.freeBytes();
    if (freeBytes >= STATE_ROOM_BYTES) return;
    throw new MigrationError('NO_SPACE', noRoomText(this.#directory, freeBytes), {
      remedy: 'free space on the file system of the state directory',
    });
  }

  async #restore(): Promise<boolean> {
    const length = await stat(this.#path).then(
      ({ size }) => size,
      () => 0,
    );
    if (length === RESERVE_BYTES) return true;
    await rm(this.#path, { force: true });
    // Twice the bytes, so that a disk that has just been freed a little is not filled again at once.
    if ((await roomIn(this.#directory)) < 2 * RESERVE_BYTES) return false;
    const draft = `${this.#path}.new`;
    try {
      const file = await open(draft, 'w', 0o600);
      try {
        await file.writeFile(randomBytes(RESERVE_BYTES));
        await file.sync();
      } finally {
        await file.close();
      }
      await rename(draft, this.#path);
      return true;
    } catch (error) {
      await rm(draft, { force: true });
      throw error;
    }
  }
}

function noRoomText(directory: string, freeBytes: number): string {
  const free = Math.floor(freeBytes / 1024);
  return `${directory} is full: ${free} KiB are left for new work, which needs ${STATE_ROOM_BYTES / 1024} KiB`;
}

/**
 * Does the work, a write of the file at `path`. If the disk is full, it gives up the reserve and does the work once
 * more. So the work must be repeatable: it must leave nothing that its repetition would trip over.
 */
export async function withReserve<T>(path: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (!isDiskFull(error) || (await Reserve.for(path)?.giveUp()) !== true) throw error;
    return work();
  }
}

/** True if a file system has no room, or its owner's quota has none. */
export function isDiskFull(error: unknown): boolean {
  if (error instanceof MigrationError) return error.code === 'NO_SPACE';
  return error instanceof Error && 'code' in error && FULL.has(error.code);
}

async function roomIn(directory: string): Promise<number> {
  const { bavail, bsize } = await statfs(directory);
  return bavail * bsize;
}

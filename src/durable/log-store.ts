import { constants } from 'node:fs';
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { withReserve } from './reserve.js';

/**
 * Stores the bytes of a record log: in a file, or in memory in the simulation. Everything that a resolved call has
 * written survives a crash of the machine.
 */
export interface LogStore {
  /** Used in messages. */
  readonly path: string;
  read(): Promise<Buffer>;
  /** Appends the bytes. If it rejects, a part of them may remain in the store. */
  append(bytes: Buffer): Promise<void>;
  truncate(lengthBytes: number): Promise<void>;
  /**
   * Replaces all bytes, or none. Returns false if there was no space; then the old bytes remain. After a rejection it
   * is unknown whether the old or the new bytes are stored.
   */
  replace(bytes: Buffer): Promise<boolean>;
  close(): Promise<void>;
}

/**
 * With O_DSYNC a write is durable by itself. A commit, which waits for it, then needs one round trip to a worker thread
 * instead of two.
 */
const FLAGS = constants.O_RDWR | constants.O_CREAT | constants.O_APPEND | constants.O_DSYNC;
/** The journal contains session tokens, so only its owner may read it. */
const MODE = 0o600;

export class FileLogStore implements LogStore {
  readonly path: string;
  #file: FileHandle;

  private constructor(path: string, file: FileHandle) {
    this.path = path;
    this.#file = file;
  }

  static async open(path: string): Promise<FileLogStore> {
    try {
      // A rewrite that a crash interrupted has left this file; the log itself is complete.
      await rm(`${path}.new`, { force: true });
      const file = await open(path, FLAGS, MODE);
      await syncDirectory(dirname(path));
      return new FileLogStore(path, file);
    } catch (error) {
      throw fileError(error, path);
    }
  }

  async read(): Promise<Buffer> {
    return this.#guard(async () => {
      const { size } = await this.#file.stat();
      const bytes = Buffer.alloc(size);
      let done = 0;
      while (done < size) {
        const { bytesRead } = await this.#file.read(bytes, done, size - done, done);
        if (bytesRead === 0) break;
        done += bytesRead;
      }
      return bytes.subarray(0, done);
    });
  }

  async append(bytes: Buffer): Promise<void> {
    // A full disk may take a part of the bytes. The repetition goes on from there.
    let done = 0;
    const write = async () => {
      while (done < bytes.length) done += (await this.#file.write(bytes, done, bytes.length - done)).bytesWritten;
    };
    await this.#guard(() => withReserve(this.path, write));
  }

  async truncate(lengthBytes: number): Promise<void> {
    await this.#guard(async () => {
      await this.#file.truncate(lengthBytes);
      await this.#file.sync();
    });
  }

  async replace(bytes: Buffer): Promise<boolean> {
    const path = `${this.path}.new`;
    const fresh = await open(path, FLAGS | constants.O_TRUNC, MODE).catch(() => null);
    if (fresh === null) return false;
    try {
      await writeAll(fresh, bytes);
      await fresh.sync();
    } catch {
      await fresh.close();
      await rm(path, { force: true }).catch(() => undefined);
      return false;
    }
    return this.#guard(async () => {
      await rename(path, this.path);
      const old = this.#file;
      this.#file = fresh;
      await old.close();
      // The directory is synced before the next append. If the rename were lost, the old file would come back without
      // that append.
      await syncDirectory(dirname(this.path));
      return true;
    });
  }

  async close(): Promise<void> {
    await this.#file.close();
  }

  async #guard<T>(work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      throw fileError(error, this.path);
    }
  }
}

async function writeAll(file: FileHandle, bytes: Buffer): Promise<void> {
  let done = 0;
  while (done < bytes.length) {
    const { bytesWritten } = await file.write(bytes, done, bytes.length - done);
    done += bytesWritten;
  }
}

async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    await directory.sync();
  } finally {
    await directory.close();
  }
}

export function fileError(thrown: unknown, path: string): MigrationError {
  if (thrown instanceof MigrationError) return thrown;
  const code = thrown instanceof Error && 'code' in thrown ? thrown.code : undefined;
  const { message } = toMigrationError(thrown);
  switch (code) {
    case 'ENOSPC':
    case 'EDQUOT':
      return new MigrationError('NO_SPACE', `${path}: ${message}`, { remedy: 'free space there', cause: thrown });
    case 'EACCES':
    case 'EPERM':
    case 'EROFS':
      return new MigrationError('NOT_PERMITTED', `${path}: ${message}`, { cause: thrown });
    default:
      return new MigrationError('INTERNAL', `${path}: ${message}`, { cause: thrown });
  }
}

/** Durable records of one kind, a JSON file each in a directory of their own. */
import { mkdir, readdir, readFile, unlink } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { z } from 'zod';
import { MigrationError } from '../domain/errors.js';
import { syncDirectory, writeDurably } from './durable-file.js';

const SUFFIX = '.json';

export interface RecordKind<T> {
  /** "session record", for messages. */
  readonly what: string;
  readonly schema: z.ZodType<T>;
  /** The record's file, without its suffix. Ids come from peers: it throws for anything but one of ours. */
  nameOf(record: T): string;
}

export class RecordFiles<T> {
  readonly #directory: string;
  readonly #kind: RecordKind<T>;
  /** The last write of each file, so that two of them never run at once and the newer record stays. */
  readonly #writes = new Map<string, Promise<void>>();

  private constructor(directory: string, kind: RecordKind<T>) {
    this.#directory = directory;
    this.#kind = kind;
  }

  static async open<T>(directory: string, kind: RecordKind<T>): Promise<RecordFiles<T>> {
    await mkdir(directory, { recursive: true, mode: 0o700 });
    return new RecordFiles(directory, kind);
  }

  /** Durable when it resolves. */
  save(record: T): Promise<void> {
    return this.#enqueue(this.#kind.nameOf(record), (path) =>
      writeDurably(path, `${JSON.stringify(record, null, 2)}\n`),
    );
  }

  /** No such file is fine. */
  remove(name: string): Promise<void> {
    return this.#enqueue(name, async (path) => {
      await unlink(path).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error;
      });
      await syncDirectory(this.#directory);
    });
  }

  /**
   * All records on disk. A file that is not ours to understand is reported and left alone, so that it does not keep the
   * others from service.
   */
  async load(): Promise<{ records: T[]; corrupt: MigrationError[] }> {
    const records: T[] = [];
    const corrupt: MigrationError[] = [];
    for (const file of await readdir(this.#directory)) {
      if (!file.endsWith(SUFFIX)) continue;
      const path = join(this.#directory, file);
      try {
        const record = this.#kind.schema.parse(JSON.parse(await readFile(path, 'utf8')));
        if (this.#kind.nameOf(record) !== basename(file, SUFFIX)) throw new Error('its name is not that of its record');
        records.push(record);
      } catch (cause) {
        corrupt.push(new MigrationError('CORRUPT', `${path} is not a ${this.#kind.what}`, { cause }));
      }
    }
    return { records, corrupt };
  }

  #enqueue(name: string, change: (path: string) => Promise<void>): Promise<void> {
    const path = join(this.#directory, `${name}${SUFFIX}`);
    const before = this.#writes.get(path) ?? Promise.resolve();
    const done = before.then(
      () => change(path),
      () => change(path),
    );
    this.#writes.set(path, done);
    const forget = () => {
      if (this.#writes.get(path) === done) this.#writes.delete(path);
    };
    done.then(forget, forget);
    return done;
  }
}

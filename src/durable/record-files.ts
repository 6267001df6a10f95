/** Durable records of one kind: one JSON file for each, in a directory of their own. */
import { mkdir, readdir, readFile, unlink } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { z } from 'zod';
import { MigrationError } from '../domain/errors.js';
import { syncDirectory, writeDurably } from './durable-file.js';

const SUFFIX = '.json';

export interface RecordKind<T> {
  /** Name of the kind in messages, for example "session record". */
  readonly what: string;
  readonly schema: z.ZodType<T>;
  /** Returns the name of the record's file without the suffix. Ids come from peers, so it throws for an invalid one. */
  nameOf(record: T): string;
}

export class RecordFiles<T> {
  readonly #directory: string;
  readonly #kind: RecordKind<T>;
  /** The last write of each file. Writes of one file run one after the other, so the newest record remains. */
  readonly #writes = new Map<string, Promise<void>>();

  private constructor(directory: string, kind: RecordKind<T>) {
    this.#directory = directory;
    this.#kind = kind;
  }

  static async open<T>(directory: string, kind: RecordKind<T>): Promise<RecordFiles<T>> {
    await mkdir(directory, { recursive: true, mode: 0o700 });
    return new RecordFiles(directory, kind);
  }

  /** Writes the record. It is durable when the promise resolves. */
  save(record: T): Promise<void> {
    return this.#enqueue(this.#kind.nameOf(record), (path) =>
      writeDurably(path, `${JSON.stringify(record, null, 2)}\n`),
    );
  }

  /** Removes the record's file, if there is one. */
  remove(name: string): Promise<void> {
    return this.#enqueue(name, async (path) => {
      await unlink(path).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error;
      });
      await syncDirectory(this.#directory);
    });
  }

  /**
   * Loads all records. A file that cannot be decoded is reported and left in place; the others are used all the same.
   */
  async load(): Promise<{ records: T[]; corrupt: MigrationError[] }> {
    const records: T[] = [];
    const corrupt: MigrationError[] = [];
    for (const file of await readdir(this.#directory)) {
      if (!file.endsWith(SUFFIX)) continue;
      const path = join(this.#directory, file);
      try {
        const record = this.#kind.schema.parse(JSON.parse(await readFile(path, 'utf8')));
        if (this.#kind.nameOf(record) !== basename(file, SUFFIX))
          throw new Error('the file name does not match the record');
        records.push(record);
      } catch (cause) {
        corrupt.push(new MigrationError('CORRUPT', `${path} is not a valid ${this.#kind.what}`, { cause }));
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

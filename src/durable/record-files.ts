/** Durable records of one kind: one JSON file for each, in a directory of their own. */
import { readdir, readFile, rm, unlink } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { z } from 'zod';
import { MigrationError } from '../domain/errors.js';
import { parseKept } from '../kit/unknown-keys.js';
import { makeDirectoryDurably, syncDirectory, writeDurably } from './durable-file.js';
import { checkVersion, corrupt, seal, unseal } from './sealed.js';
import type { RecordFolder } from './state-format.js';

const SUFFIX = '.json';

export interface RecordKind<T> {
  /** Name of the kind in messages, for example "session record". */
  readonly what: string;
  readonly schema: z.ZodType<T>;
  /** The newest version of the record that this build reads. */
  readonly version: number;
  /** Returns the name of the record's file without the suffix. Ids come from peers, so it throws for an invalid one. */
  nameOf(record: T): string;
}

export class RecordFiles<T extends object> {
  readonly #directory: string;
  readonly #kind: RecordKind<T>;
  /** The last write of each file. Writes of one file run one after the other, so the newest record remains. */
  readonly #writes = new Map<string, Promise<void>>();

  private constructor(directory: string, kind: RecordKind<T>) {
    this.#directory = directory;
    this.#kind = kind;
  }

  /** Opens the records in that folder of the state directory. */
  static async open<T extends object>(
    stateDir: string,
    folder: RecordFolder,
    kind: RecordKind<T>,
  ): Promise<RecordFiles<T>> {
    const directory = join(stateDir, folder);
    await makeDirectoryDurably(directory);
    for (const name of await readdir(directory))
      if (name.endsWith(`${SUFFIX}.new`)) await rm(join(directory, name), { force: true });
    return new RecordFiles(directory, kind);
  }

  /** Writes the record. It is durable when the promise resolves. */
  save(record: T): Promise<void> {
    return this.#enqueue(this.#kind.nameOf(record), (path) => writeDurably(path, seal(record)));
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
        records.push(decodeRecord(this.#kind, await readFile(path, 'utf8'), path));
      } catch (cause) {
        corrupt.push(unreadable(`${path} cannot be read`, cause));
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

/** Throws CORRUPT if the text is not what `save` writes to this path, UNSUPPORTED if it is of a newer version. */
export function decodeRecord<T>(kind: RecordKind<T>, text: string, path: string): T {
  const json = unseal(text, path);
  checkVersion(json, kind.version, path);
  try {
    const record = parseKept(kind.schema, json);
    if (kind.nameOf(record) === basename(path, SUFFIX)) return record;
    throw new Error('the file name does not match the record');
  } catch (cause) {
    throw unreadable(`${path} is not a valid ${kind.what}`, cause);
  }
}

/** An error with a code of its own is kept: it says more than that the record is invalid. */
export function unreadable(message: string, cause: unknown): MigrationError {
  return cause instanceof MigrationError ? cause : corrupt(message, cause);
}

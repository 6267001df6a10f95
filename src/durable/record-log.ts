import { MigrationError, toMigrationError } from '../domain/errors.js';
import { decodeFrames, encodeFrame } from './frames.js';
import type { LogStore } from './log-store.js';

/**
 * Stores records as lines with length and checksum (frames.ts), appended durably and in order. A crash can cut the last
 * line short, so a line that is shorter than its length says is dropped: its append never resolved. A whole line that
 * is damaged in any byte, its end included, is CORRUPT, because dropping it (and with it perhaps a commit) can be worse
 * than not starting.
 */
export class RecordLog<T> {
  readonly #store: LogStore;
  readonly #decode: (json: unknown) => T;
  #lengthBytes: number;
  #lineCount: number;
  /** Set if the file's end is unknown. Then nothing is appended until the log is opened, and thereby read, again. */
  #broken: MigrationError | null = null;
  #waiting: { line: Buffer; resolve: () => void; reject: (error: MigrationError) => void; onDurable?: () => void }[] =
    [];
  #writing: Promise<void> | null = null;

  private constructor(store: LogStore, decode: (json: unknown) => T, lengthBytes: number, lineCount: number) {
    this.#store = store;
    this.#decode = decode;
    this.#lengthBytes = lengthBytes;
    this.#lineCount = lineCount;
  }

  /**
   * Opens the log and reads its records. `decode` throws for anything but a record. The log owns the store from here
   * on, and closes it if it cannot be read.
   */
  static async open<T>(store: LogStore, decode: (json: unknown) => T): Promise<{ log: RecordLog<T>; records: T[] }> {
    try {
      const bytes = await store.read();
      const { records, wholeBytes } = decodeFrames(bytes, decode, store.path);
      if (wholeBytes < bytes.length) await store.truncate(wholeBytes);
      return { log: new RecordLog<T>(store, decode, wholeBytes, records.length), records };
    } catch (error) {
      await store.close();
      throw error;
    }
  }

  get lineCount(): number {
    return this.#lineCount;
  }

  #check(json: string): void {
    try {
      this.#decode(JSON.parse(json));
    } catch (cause) {
      throw new MigrationError('INTERNAL', `${this.#store.path}: an invalid record was not written`, {
        cause,
      });
    }
  }

  get broken(): MigrationError | null {
    return this.#broken;
  }

  /**
   * Appends a record. It is durable when the promise resolves. If the promise rejects, the record is not in the log,
   * unless the log is `broken` then. Waiting records share one write. `onDurable` runs before anything else is written
   * or rewritten, so state that it keeps always matches the log. Throws INTERNAL, without writing, for a record that
   * the next `open` would refuse, because such a line would keep the daemon from starting.
   */
  append(record: T, onDurable?: () => void): Promise<void> {
    return new Promise((resolve, reject) => {
      const json = JSON.stringify(record);
      this.#check(json);
      this.#waiting.push({
        line: encodeFrame(json),
        resolve,
        reject,
        ...(onDurable === undefined ? {} : { onDurable }),
      });
      this.#writing ??= this.#write();
    });
  }

  /**
   * Replaces the log's content by the records that `recordsNow` returns; it is called when no write is under way.
   * Returns false if there was no space for that, which is harmless.
   */
  async rewrite(recordsNow: () => readonly T[]): Promise<boolean> {
    while (this.#writing !== null) await this.#writing;
    if (this.#broken !== null) throw this.#broken;
    const records = recordsNow();
    const rewriting = this.#rewrite(
      Buffer.concat(records.map((record) => encodeFrame(JSON.stringify(record)))),
      records.length,
    );
    this.#writing = rewriting.then(
      () => this.#next(),
      () => this.#next(),
    );
    return rewriting;
  }

  async #rewrite(bytes: Buffer, lineCount: number): Promise<boolean> {
    try {
      if (!(await this.#store.replace(bytes))) return false;
    } catch (error) {
      this.#broken = this.#unknownEnd(error);
      throw this.#broken;
    }
    this.#lengthBytes = bytes.length;
    this.#lineCount = lineCount;
    return true;
  }

  async close(): Promise<void> {
    while (this.#writing !== null) await this.#writing;
    this.#broken ??= new MigrationError('INTERNAL', `${this.#store.path} is closed`);
    await this.#store.close();
  }

  async #write(): Promise<void> {
    const batch = this.#waiting.splice(0);
    try {
      if (this.#broken !== null) throw this.#broken;
      const bytes = batch.length === 1 && batch[0] ? batch[0].line : Buffer.concat(batch.map(({ line }) => line));
      await this.#store.append(bytes);
      this.#lengthBytes += bytes.length;
      this.#lineCount += batch.length;
      for (const { resolve, onDurable } of batch) {
        onDurable?.();
        resolve();
      }
    } catch (thrown) {
      const error = toMigrationError(thrown);
      await this.#cutBack(error);
      for (const { reject } of batch) reject(this.#broken ?? error);
    }
    this.#next();
  }

  #next(): void {
    this.#writing = this.#waiting.length > 0 ? this.#write() : null;
  }

  /** Removes what a failed append may have left, so that the next line begins where the last good one ends. */
  async #cutBack(cause: MigrationError): Promise<void> {
    if (this.#broken !== null) return;
    try {
      await this.#store.truncate(this.#lengthBytes);
    } catch {
      this.#broken = this.#unknownEnd(cause);
    }
  }

  #unknownEnd(cause: unknown): MigrationError {
    return new MigrationError('CORRUPT', `${this.#store.path}: a write failed and could not be undone`, {
      remedy: 'repair the file system, then restart vmigrated',
      cause,
    });
  }
}

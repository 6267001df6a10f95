import { crc32 } from 'node:zlib';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { LogStore } from './log-store.js';

/**
 * Records as lines `CRC32 JSON\n`, appended durably, in order. A crash can cut the last line short, and only there the
 * log forgives: bytes after the last newline were never answered for. A whole line that does not hold what was written
 * is CORRUPT, because what follows from dropping it (a commit that did not happen) can be worse than not starting.
 */
export class RecordLog<T> {
  readonly #store: LogStore;
  readonly #decode: (json: unknown) => T;
  #lengthBytes: number;
  #lineCount: number;
  /**
   * Set when the file's end is not known any more. Then nothing is appended until it has been opened, and thereby read,
   * again.
   */
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
   * `decode` throws on anything but a record. The store is the log's from here on; it is closed if it cannot be read.
   */
  static async open<T>(store: LogStore, decode: (json: unknown) => T): Promise<{ log: RecordLog<T>; records: T[] }> {
    try {
      const bytes = await store.read();
      const lengthBytes = bytes.lastIndexOf(0x0a) + 1;
      const lines = lengthBytes === 0 ? [] : bytes.toString('utf8', 0, lengthBytes - 1).split('\n');
      const records = lines.map((line, index) => decodeLine(line, decode, `${store.path}:${index + 1}`));
      if (lengthBytes < bytes.length) await store.truncate(lengthBytes);
      return { log: new RecordLog<T>(store, decode, lengthBytes, lines.length), records };
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
      throw new MigrationError('INTERNAL', `${this.#store.path}: a record was not written that could not be read`, {
        cause,
      });
    }
  }

  get broken(): MigrationError | null {
    return this.#broken;
  }

  /**
   * Durable when it resolves; certainly not in the log when it rejects, unless the log is `broken` then. Those that
   * wait share one write. `onDurable` runs before anything else can be written or rewritten, so what it keeps is always
   * what the log holds. INTERNAL, and nothing is written, for a record that the next `open` would refuse: such a line
   * would keep the daemon from starting.
   */
  append(record: T, onDurable?: () => void): Promise<void> {
    return new Promise((resolve, reject) => {
      const json = JSON.stringify(record);
      this.#check(json);
      this.#waiting.push({
        line: lineOf(json),
        resolve,
        reject,
        ...(onDurable === undefined ? {} : { onDurable }),
      });
      this.#writing ??= this.#write();
    });
  }

  /**
   * Makes what `recordsNow` returns (when no write is under way) all that the log holds; false if there was no room for
   * that, which harms nothing.
   */
  async rewrite(recordsNow: () => readonly T[]): Promise<boolean> {
    while (this.#writing !== null) await this.#writing;
    if (this.#broken !== null) throw this.#broken;
    const records = recordsNow();
    const rewriting = this.#rewrite(Buffer.concat(records.map(encodeLine)), records.length);
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

  /** Takes back what a failed append may have left, so that the next line begins where the last good one ends. */
  async #cutBack(cause: MigrationError): Promise<void> {
    if (this.#broken !== null) return;
    try {
      await this.#store.truncate(this.#lengthBytes);
    } catch {
      this.#broken = this.#unknownEnd(cause);
    }
  }

  #unknownEnd(cause: unknown): MigrationError {
    return new MigrationError('CORRUPT', `${this.#store.path}: a write failed and could not be taken back`, {
      remedy: 'repair the file system, then restart vmigrated',
      cause,
    });
  }
}

function encodeLine(record: unknown): Buffer {
  return lineOf(JSON.stringify(record));
}

function lineOf(json: string): Buffer {
  return Buffer.from(`${checksum(json)} ${json}\n`);
}

function decodeLine<T>(line: string, decode: (json: unknown) => T, where: string): T {
  const json = line.slice(9);
  if (line[8] !== ' ' || line.slice(0, 8) !== checksum(json)) {
    throw new MigrationError('CORRUPT', `${where}: the line does not match its checksum`, {
      remedy: 'restore the file from a copy; do not delete the line: it may say who owns a VM',
    });
  }
  try {
    return decode(JSON.parse(json));
  } catch (error) {
    throw new MigrationError('CORRUPT', `${where}: ${toMigrationError(error).message}`, { cause: error });
  }
}

function checksum(text: string): string {
  return crc32(text).toString(16).padStart(8, '0');
}

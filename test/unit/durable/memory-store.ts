import { MigrationError } from '../../../src/domain/errors.js';
import type { LogStore } from '../../../src/durable/log-store.js';

/** A file in memory that fails on demand. */
export class MemoryStore implements LogStore {
  readonly path = 'memory';
  #chunks: Buffer[] = [];
  /** Bytes that the next append still writes before it fails. Null: it does not fail. */
  room: number | null = null;
  canTruncate = true;

  get bytes(): Buffer {
    return Buffer.concat(this.#chunks);
  }
  set bytes(bytes: Buffer) {
    this.#chunks = [bytes];
  }

  async read(): Promise<Buffer> {
    return this.bytes;
  }
  async append(bytes: Buffer): Promise<void> {
    const { room } = this;
    this.#chunks.push(bytes.subarray(0, room ?? bytes.length));
    if (room !== null) throw new MigrationError('NO_SPACE', 'full');
  }
  async truncate(lengthBytes: number): Promise<void> {
    if (!this.canTruncate) throw new MigrationError('INTERNAL', 'I/O error');
    this.#chunks = [this.bytes.subarray(0, lengthBytes)];
  }
  async replace(bytes: Buffer): Promise<boolean> {
    if (this.room !== null) return false;
    this.#chunks = [bytes];
    return true;
  }
  async close(): Promise<void> {}
}

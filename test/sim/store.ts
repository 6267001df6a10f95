import { MigrationError } from '../../src/domain/errors.js';
import type { LogStore } from '../../src/durable/log-store.js';
import type { Life } from './time.js';

/** The bytes of one file. They survive the daemons that write them. */
export interface Disk {
  readonly path: string;
  bytes: Buffer;
}

export interface StoreWorld {
  isFull(): boolean;
  /** Marks an event, at which a test may kill, cut or fill something. */
  event(label: string): void;
  chance(): number;
}

/** A file as one life of a daemon sees it. A write that a crash or a full disk interrupts leaves part of its bytes. */
export class SimStore implements LogStore {
  readonly #disk: Disk;
  readonly #life: Life;
  readonly #world: StoreWorld;

  constructor(disk: Disk, life: Life, world: StoreWorld) {
    this.#disk = disk;
    this.#life = life;
    this.#world = world;
  }

  get path(): string {
    return this.#disk.path;
  }

  async read(): Promise<Buffer> {
    await this.#life.survive();
    return Buffer.from(this.#disk.bytes);
  }

  async append(bytes: Buffer): Promise<void> {
    await this.#life.survive();
    const before = this.#disk.bytes;
    this.#world.event(`write ${this.path}`);
    const isCut = !this.#life.isAlive || this.#world.isFull();
    const count = isCut ? Math.floor(this.#world.chance() * bytes.length) : bytes.length;
    this.#disk.bytes = Buffer.concat([before, bytes.subarray(0, count)]);
    await this.#life.sleep(0.1);
    if (isCut) throw new MigrationError('NO_SPACE', `${this.path}: no space left`);
    this.#world.event(`written ${this.path}`);
    await this.#life.survive();
  }

  async truncate(lengthBytes: number): Promise<void> {
    await this.#life.survive();
    this.#disk.bytes = this.#disk.bytes.subarray(0, lengthBytes);
  }

  async replace(bytes: Buffer): Promise<boolean> {
    await this.#life.survive();
    if (this.#world.isFull()) return false;
    this.#disk.bytes = Buffer.from(bytes);
    return true;
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

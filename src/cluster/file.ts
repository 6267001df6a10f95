import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { DirectoryLock } from '../durable/directory-lock.js';
import { FileLogStore, fileError, type LogStore } from '../durable/log-store.js';
import { RecordLog } from '../durable/record-log.js';
import type { OwnerRecord, Registry } from '../engine/ports/registry.js';

const ownerRecord = z.strictObject({
  vm: z.string().min(1).max(255),
  owner: z.string().min(1).max(255),
  epoch: z.int().min(1),
  session: z
    .string()
    .regex(/^[0-9a-f]{32}$/)
    .nullable(),
});
/**
 * `swap` replaces the record of a VM. `remove` ends it at `epoch`, which logs of earlier builds lack. The last line of
 * a VM counts.
 */
const change = z.discriminatedUnion('type', [
  z.strictObject({ type: z.literal('swap'), record: ownerRecord }),
  z.strictObject({ type: z.literal('remove'), vm: z.string().min(1), epoch: z.int().min(1).optional() }),
]);
type Change = z.infer<typeof change>;

/** How many superseded lines may accumulate before the log is rewritten. */
const STALE_LINES_MAX = 1024;
/** How many last epochs are kept of VMs without a record; those of the VMs removed first are dropped. */
const ENDED_MAX = 4096;

/**
 * The embedded registry: the owner records of this host in one append-only log. A compare-and-swap costs one durable
 * append, for which a guest waits during a commit. Measured: 0.13 ms, where a file for each VM (write, fsync, rename,
 * fsync) takes 0.45 ms.
 */
export class FileRegistry implements Registry {
  readonly #log: RecordLog<Change>;
  readonly #lock: DirectoryLock | null;
  readonly #owners = new Map<string, OwnerRecord>();
  /**
   * Last epochs of VMs that no longer have a record. Other hosts may remember such an epoch, so a new VM of the same
   * name that began at 1 again could not move there.
   */
  readonly #ended = new Map<string, number>();
  #turn: Promise<unknown> = Promise.resolve();

  private constructor(log: RecordLog<Change>, lock: DirectoryLock | null) {
    this.#log = log;
    this.#lock = lock;
  }

  /** Opens the registry. Throws CONFLICT if a running daemon uses the directory, CORRUPT if a record is damaged. */
  static async open(directory: string): Promise<FileRegistry> {
    await mkdir(directory, { recursive: true, mode: 0o700 }).catch((error: unknown) => {
      throw fileError(error, directory);
    });
    const lock = await DirectoryLock.take(directory);
    try {
      return await FileRegistry.on(await FileLogStore.open(join(directory, 'owners.log')), lock);
    } catch (error) {
      await lock.giveBack();
      throw error;
    }
  }

  /** Opens the registry on a store of the caller, who ensures that nothing else uses it. */
  static async on(store: LogStore, lock: DirectoryLock | null = null): Promise<FileRegistry> {
    const { log, records } = await RecordLog.open(store, (json) => change.parse(json));
    const registry = new FileRegistry(log, lock);
    for (const entry of records) registry.#note(entry);
    if (registry.#staleLines > STALE_LINES_MAX) await registry.#compact();
    return registry;
  }

  /** Returns the owner record. Rejects if a failed write has left the record unknown. */
  owner(vm: string): Promise<OwnerRecord | null> {
    return this.#inTurn(async () => {
      if (this.#log.broken !== null) throw this.#log.broken;
      return this.#owners.get(vm) ?? null;
    });
  }

  swapOwner(vm: string, expectedEpoch: number | null, next: OwnerRecord): Promise<void> {
    return this.#inTurn(async () => {
      this.#expect(vm, expectedEpoch);
      const record = ownerRecord.parse(next);
      if (record.vm !== vm)
        throw new MigrationError('INTERNAL', `a record of ${record.vm} cannot replace one of ${vm}`);
      if (expectedEpoch !== null && record.epoch <= expectedEpoch) {
        throw new MigrationError('OWNER_CHANGED', `the new epoch of ${vm} must be greater than ${expectedEpoch}`);
      }
      await this.#append({ type: 'swap', record });
    });
  }

  removeOwner(vm: string, expectedEpoch: number): Promise<void> {
    return this.#inTurn(async () => {
      this.#expect(vm, expectedEpoch);
      await this.#append({ type: 'remove', vm, epoch: expectedEpoch });
    });
  }

  lastEpoch(vm: string): Promise<number> {
    return this.#inTurn(async () => {
      if (this.#log.broken !== null) throw this.#log.broken;
      return this.#owners.get(vm)?.epoch ?? this.#ended.get(vm) ?? 0;
    });
  }

  async close(): Promise<void> {
    await this.#turn;
    await this.#log.close();
    await this.#lock?.giveBack();
  }

  #expect(vm: string, expectedEpoch: number | null): void {
    const present = this.#owners.get(vm) ?? null;
    if ((present?.epoch ?? null) === expectedEpoch) return;
    const has = present === null ? 'no record' : `owner ${present.owner} in epoch ${present.epoch}`;
    throw new MigrationError('OWNER_CHANGED', `${vm} has ${has}, not epoch ${expectedEpoch ?? 'none'}`, {
      details: present,
    });
  }

  async #append(entry: Change): Promise<void> {
    await this.#log.append(entry);
    this.#note(entry);
    this.#compactSoon();
  }

  #note(entry: Change): void {
    if (entry.type === 'swap') {
      this.#owners.set(entry.record.vm, entry.record);
      this.#ended.delete(entry.record.vm);
      return;
    }
    const { vm, epoch } = entry;
    this.#owners.delete(vm);
    if (epoch === undefined) return;
    this.#ended.set(vm, epoch);
    const [longestGone] = this.#ended.keys();
    if (this.#ended.size > ENDED_MAX && longestGone !== undefined) this.#ended.delete(longestGone);
  }

  get #staleLines(): number {
    return this.#log.lineCount - this.#owners.size - this.#ended.size;
  }

  /** Queues a rewrite of the log behind the current call, which does not wait for it. */
  #compactSoon(): void {
    if (this.#staleLines <= STALE_LINES_MAX) return;
    // A rewrite that fails leaves the log broken, and the next call reports it.
    this.#inTurn(() => this.#compact()).catch(() => undefined);
  }

  async #compact(): Promise<void> {
    await this.#log.rewrite(() => [
      ...[...this.#ended].map(([vm, epoch]): Change => ({ type: 'remove', vm, epoch })),
      ...[...this.#owners.values()].map((record): Change => ({ type: 'swap', record })),
    ]);
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(work).catch((error: unknown) => {
      throw toMigrationError(error);
    });
    this.#turn = result.catch(() => undefined);
    return result;
  }
}

/**
 * Ends clones before they take memory that others were promised. A clone costs only the pages that it writes, so clones
 * may be promised more than there is. What they write is counted here, once a second. If it is more than their budget,
 * or if the host has hardly any memory left, the newest clones end until it is enough. Other VMs are never touched.
 */
import { toMigrationError } from '../../domain/errors.js';
import type { Log } from '../../kit/log.js';
import { memoryAvailableBytes } from '../vm/ram-files.js';
import type { VmManager } from '../vm/vms.js';

const LOOK_MS = 1_000;
/** Below this a host cannot even start a program to free memory. */
const RESERVE_BYTES = 64 * 1024 * 1024;
const MIB = 1024 * 1024;

export interface CloneMemoryOptions {
  readonly vms: Pick<VmManager, 'clonesWriting' | 'endForMemory' | 'room'>;
  readonly log: Log;
  readonly availableBytes?: () => Promise<number>;
}

export class CloneMemoryWatch {
  readonly #options: CloneMemoryOptions;
  #timer: NodeJS.Timeout | null = null;
  #look: Promise<void> = Promise.resolve();

  constructor(options: CloneMemoryOptions) {
    this.#options = options;
  }

  start(): void {
    this.#timer = setInterval(() => {
      this.#look = this.#look.then(() => this.look());
    }, LOOK_MS).unref();
  }

  async close(): Promise<void> {
    if (this.#timer !== null) clearInterval(this.#timer);
    this.#timer = null;
    await this.#look;
  }

  /** Counts once, and ends clones if they have taken too much. Never rejects. */
  async look(): Promise<void> {
    const { vms, log, availableBytes = memoryAvailableBytes } = this.#options;
    try {
      const clones = vms.clonesWriting();
      if (clones.length === 0) return;
      const budgetBytes = await vms.room.cloneBudgetBytes();
      let excessBytes = Math.max(
        clones.reduce((bytes, { ownBytes }) => bytes + ownBytes, 0) - budgetBytes,
        RESERVE_BYTES - (await availableBytes()),
      );
      // Newest first: the oldest has done most of its work.
      for (const { name, ownBytes } of [...clones].reverse()) {
        if (excessBytes <= 0) return;
        log.warn(
          { vm: name, ownMiB: Math.round(ownBytes / MIB), budgetMiB: Math.round(budgetBytes / MIB) },
          'the clones have written more than their budget: the newest is ended',
        );
        try {
          await vms.endForMemory(name);
          excessBytes -= ownBytes;
        } catch (error) {
          // The next newest ends in its place.
          log.error({ vm: name, err: toMigrationError(error) }, 'the clone cannot be ended');
        }
      }
    } catch (error) {
      log.warn({ err: toMigrationError(error) }, 'the memory of the clones could not be counted');
    }
  }
}

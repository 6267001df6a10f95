/**
 * A second copy of the newest owner records, in the memory directory. It shares the fate of the guests' memory: both
 * outlive the daemon, neither outlives the machine's boot, and neither is in a backup of the state directory. So
 * whatever lets a daemon find a guest that it may run, also lets it find to whom the guest belongs, even if the state
 * directory has been restored from a backup meanwhile.
 *
 * The copy of a change is written after the change itself, and before anything else happens. So the target of a commit
 * that has no copy has not run the VM. The write takes some 50 µs, because the file is on tmpfs.
 */
import { join } from 'node:path';
import { type MigrationError, toMigrationError } from '../domain/errors.js';
import { FileLogStore, type LogStore } from '../durable/log-store.js';
import { RecordLog } from '../durable/record-log.js';
import { OWNERS_MIRROR } from '../durable/state-format.js';
import { decodeOwnerChange, epochOf, type OwnerChange, vmOf } from './change.js';

const STALE_LINES_MAX = 1024;

export class OwnerMirror {
  readonly #log: RecordLog<OwnerChange>;
  readonly #newest = new Map<string, OwnerChange>();
  readonly #warn: (error: MigrationError) => void;
  #isFailing = false;

  private constructor(log: RecordLog<OwnerChange>, warn: (error: MigrationError) => void) {
    this.#log = log;
    this.#warn = warn;
  }

  /**
   * Opens the copy in the memory directory. A damaged one is begun anew, and `warn` is called: it only adds to the
   * records of the state directory, which are checked by themselves. It is also called if the copy can no longer be
   * written. Null, after a warning: it cannot be opened at all, and the daemon goes on without it.
   */
  static async open(ramDir: string, warn: (error: MigrationError) => void): Promise<OwnerMirror | null> {
    try {
      return await OwnerMirror.on(() => FileLogStore.open(join(ramDir, OWNERS_MIRROR)), warn);
    } catch (error) {
      warn(toMigrationError(error));
      return null;
    }
  }

  /** The same on stores of the caller, each for the same bytes. */
  static async on(storeOf: () => Promise<LogStore>, warn: (error: MigrationError) => void): Promise<OwnerMirror> {
    const opened = await RecordLog.open(await storeOf(), decodeOwnerChange).catch(async (error: unknown) => {
      warn(toMigrationError(error));
      const store = await storeOf();
      await store.truncate(0);
      return RecordLog.open(store, decodeOwnerChange);
    });
    const mirror = new OwnerMirror(opened.log, warn);
    for (const change of opened.records) mirror.#newest.set(vmOf(change), change);
    return mirror;
  }

  /** The newest change of each VM. */
  get changes(): readonly OwnerChange[] {
    return [...this.#newest.values()];
  }

  /**
   * Copies a change that is durable by now. Resolves when the copy is written, or cannot be written: the change has
   * happened all the same.
   */
  async note(change: OwnerChange): Promise<void> {
    this.#newest.set(vmOf(change), change);
    try {
      // Changes that could not be written before are written now, too.
      if (this.#isFailing) {
        if (!(await this.#log.rewrite(() => this.changes))) return;
      } else await this.#log.append(change);
      this.#isFailing = false;
      if (this.#log.lineCount > this.#newest.size + STALE_LINES_MAX) await this.#log.rewrite(() => this.changes);
    } catch (error) {
      if (!this.#isFailing) this.#warn(toMigrationError(error));
      this.#isFailing = true;
    }
  }

  /** Drops what the registry does not know any more, so that the copy does not outgrow it. */
  async keepOnly(isKept: (vm: string, epoch: number) => boolean): Promise<void> {
    for (const [vm, change] of this.#newest) if (!isKept(vm, epochOf(change))) this.#newest.delete(vm);
    if (this.#log.lineCount > this.#newest.size) await this.#log.rewrite(() => this.changes).catch(() => undefined);
  }

  close(): Promise<void> {
    return this.#log.close();
  }
}

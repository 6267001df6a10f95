/**
 * The load of an incoming VM's device state. If pages were fetched while the VM still ran on the source, those that it
 * has written since are given up first: a device may read memory while it loads, and would find an old page. So until
 * the last round has been taken back, the device state waits here, and QEMU gets no byte of it.
 */
import { PassThrough, pipeline, type Readable } from 'node:stream';
import type { StateImport } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { type MigrationMode, tracksWrites } from '../../domain/migration.js';
import type { FetchedAhead } from '../../engine/ports/target.js';
import type { ManagedVm } from '../vm/vms.js';
import type { PageSession } from './page-session.js';

/**
 * The source's QEMU begins its stream while the VM runs, with memory that is not the guest's (firmware, video), and
 * would not stop the VM before it has sent that. This is more than usual VMs have of it. With more than this the stop
 * would not come in time, and the move would be undone.
 */
const HELD_BYTES_MAX = 128 * 2 ** 20;

export class Loading {
  readonly #vm: ManagedVm;
  readonly #state: StateImport;
  readonly #pages: PageSession | null;
  /** Null: the device state need not wait. */
  readonly #gate: Gate | null;
  #last = { round: 0, pages: 0 };
  #taking: { readonly round: number; readonly done: Promise<{ pages: number }> } | null = null;

  constructor(vm: ManagedVm, state: StateImport, pages: PageSession | null, mode: MigrationMode) {
    this.#vm = vm;
    this.#state = state;
    this.#pages = pages;
    this.#gate = tracksWrites(mode) ? new Gate() : null;
  }

  /** Passes the device state to QEMU. Resolves when QEMU has loaded all of it. The VM does not run yet. */
  async accept(body: Readable): Promise<void> {
    const state = this.#gate === null ? body : await this.#gate.passed(body);
    await this.#explained(this.#state.accept(state));
  }

  /**
   * The coordinator calls it once the source has stopped. The source's memory is final then, so faults may be served.
   * They must be served, because a device may read guest memory while it loads its state (virtio-net reads its rings),
   * and QEMU's main loop would wait for ever.
   */
  async awaitLoaded(lastRound?: number): Promise<void> {
    if (this.#gate !== null) await this.#takeLast(this.#gate, lastRound);
    this.#pages?.serveDemand();
    this.#gate?.open();
    await this.#explained(this.#state.loaded());
  }

  /** Fetches pages while the VM runs on the source. */
  async fetchAhead(msMax: number, holds: boolean): Promise<FetchedAhead> {
    return this.#ahead.fetchAhead(msMax, holds);
  }

  /**
   * No round may be left out, because its writes are in no other. A daemon that has started since does not know which
   * were taken, and takes none but the first: then the move is undone.
   */
  async takeBack(round: number): Promise<{ pages: number }> {
    const pages = this.#ahead;
    if (round === this.#taking?.round) return this.#taking.done;
    if (round === this.#last.round) return { pages: this.#last.pages };
    if (this.#taking !== null || round !== this.#last.round + 1)
      throw new MigrationError('CONFLICT', `round ${round} cannot follow round ${this.#last.round}`);
    const done = pages.takeBack(round).then((taken) => {
      this.#last = { round, pages: taken.pages };
      return taken;
    });
    this.#taking = { round, done };
    try {
      return await done;
    } finally {
      this.#taking = null;
    }
  }

  /** A device state that waits is refused. Idempotent. */
  end(error: MigrationError): void {
    this.#gate?.refuse(error);
    this.#state.end(error);
  }

  /** Throws CONFLICT if nothing is fetched ahead. */
  get #ahead(): PageSession {
    if (this.#gate !== null && this.#pages !== null) return this.#pages;
    throw new MigrationError('CONFLICT', `no pages of ${this.#vm.spec.name} are fetched ahead`);
  }

  async #takeLast(gate: Gate, lastRound?: number): Promise<void> {
    try {
      if (lastRound === undefined)
        throw new MigrationError('CONFLICT', `the last round of ${this.#vm.spec.name} is not named`);
      await this.takeBack(lastRound);
    } catch (thrown) {
      const error = toMigrationError(thrown);
      gate.refuse(error);
      throw error;
    }
  }

  /** Adds the last words of QEMU, whose log goes with the session. */
  async #explained<T>(work: Promise<T>): Promise<T> {
    try {
      return await work;
    } catch (error) {
      throw await this.#vm.process.explain(error);
    }
  }
}

/** Lets a stream pass once it is opened. Opened or refused, it stays so. */
class Gate {
  open: () => void = () => undefined;
  refuse: (error: MigrationError) => void = () => undefined;
  readonly #opened = new Promise<void>((open, refuse) => {
    this.open = open;
    this.refuse = refuse;
  });

  constructor() {
    // It may be refused when nothing waits.
    this.#opened.catch(() => undefined);
  }

  /** `body` is read meanwhile, and kept. If it is refused, it is read to its end: its sender waits for the answer. */
  async passed(body: Readable): Promise<Readable> {
    const held = new PassThrough({ readableHighWaterMark: HELD_BYTES_MAX });
    // A stream that breaks here is noticed when it is passed on.
    held.on('error', () => undefined);
    pipeline(body, held, () => undefined);
    try {
      await this.#opened;
      return held;
    } catch (error) {
      held.resume();
      throw error;
    }
  }
}

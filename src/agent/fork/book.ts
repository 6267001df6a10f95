/** What a fork's session knows of its results, in memory and in its record. */
import type { ErrorJson } from '../../domain/errors.js';
import type { CloneIdentity } from '../../domain/fork.js';
import type { Transport } from '../../domain/transport.js';
import type { ForkOutcome, ForkRecord, ForkStore } from './record.js';

export class ForkBook {
  readonly #store: ForkStore;
  #record: ForkRecord;
  #outcome: ForkOutcome;

  constructor(store: ForkStore, record: ForkRecord) {
    this.#store = store;
    this.#record = record;
    this.#outcome = record.outcome ?? { failures: [], parentPauseMs: 0, deviceStateBytes: 0, ready: [] };
  }

  get record(): ForkRecord {
    return this.#record;
  }

  get outcome(): ForkOutcome {
    return this.#outcome;
  }

  get isCommitted(): boolean {
    return this.#record.state === 'committed';
  }

  note(change: Partial<ForkOutcome>): void {
    this.#outcome = { ...this.#outcome, ...change };
  }

  /** Writes the commit. The record in memory says so only when the write is durable. */
  async commit(clones: readonly CloneIdentity[]): Promise<void> {
    const committed: ForkRecord = { ...this.#record, state: 'committed', clones, outcome: this.#outcome };
    await this.#store.save(committed);
    this.#record = committed;
  }

  /** The caller has seen to it that no commit is under way, which would be overwritten. */
  async want(transport: Transport): Promise<void> {
    if (this.#record.transport === transport) return;
    this.#record = { ...this.#record, transport };
    await this.#store.save(this.#record);
  }

  /** After the commit: durable when it resolves. */
  async mark(change: Pick<ForkRecord, 'isReleased' | 'isCompleting'>): Promise<void> {
    this.#record = { ...this.#record, ...change };
    await this.#store.save(this.#record);
  }

  /** In memory: the caller saves the record. */
  settle(change: Partial<ForkOutcome>): void {
    this.note(change);
    this.#record = { ...this.#record, outcome: this.#outcome };
  }

  /** In memory: the caller saves the record. */
  fail(failure: ErrorJson): void {
    this.#record = { ...this.#record, failure };
  }
}

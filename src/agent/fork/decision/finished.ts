/**
 * The forks that were committed and are over on this host. A host that has joined one of them may have missed its
 * commit, and must not hear that the fork was discarded. The records of forks over several hosts stay for that
 * (`finishRecord`). Only the latest are kept, because a coordinator finishes a fork here last.
 */
const KEPT_MAX = 1024;

interface RecordRemover {
  remove(fork: string): Promise<void>;
}

export class FinishedForks {
  readonly #store: RecordRemover;
  readonly #forks = new Set<string>();

  constructor(store: RecordRemover) {
    this.#store = store;
  }

  has(fork: string): boolean {
    return this.#forks.has(fork);
  }

  async add(fork: string): Promise<void> {
    this.#forks.add(fork);
    const [oldest] = this.#forks;
    if (this.#forks.size <= KEPT_MAX || oldest === undefined) return;
    this.#forks.delete(oldest);
    await this.#store.remove(oldest);
  }
}

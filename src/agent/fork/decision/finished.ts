/**
 * The forks that were committed and are over on this host. Their coordinator may still ask whether they were committed,
 * by an undo, because the parent of a fork over several hosts is released before its job has ended. An undo that
 * succeeded would say that they were not. The records of such forks stay for that (`finishRecord`), the latest of them.
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

/**
 * The forks that their coordinator has let go, although their images are not complete: this host reads only what their
 * clones touch, and does so until the image is complete or is removed.
 */
import { toMigrationError } from '../../domain/errors.js';
import type { Log } from '../../kit/log.js';
import type { LazyImages } from './image-calls.js';
import type { ForkSession } from './session.js';

export class ReleasedForks implements LazyImages {
  readonly #log: Log;
  readonly #forks = new Map<string, ForkSession>();
  readonly #onOver: (fork: string) => Promise<void>;

  /** `onOver`: the image of the fork is complete, or has failed. */
  constructor(log: Log, onOver: (fork: string) => Promise<void>) {
    this.#log = log;
    this.#onOver = onOver;
  }

  add(fork: string, session: ForkSession): void {
    this.#forks.set(fork, session);
    session
      .untilFilled()
      .then(async (isOver) => {
        if (!isOver) return;
        this.#forks.delete(fork);
        await this.#onOver(fork);
      })
      .catch((error: unknown) => {
        this.#log.error({ fork, err: toMigrationError(error) }, 'a fork that was let go cannot be ended');
      });
  }

  get all(): readonly ForkSession[] {
    return [...this.#forks.values()];
  }

  hasFork(fork: string): boolean {
    return this.#forks.has(fork);
  }

  fork(fork: string): ForkSession | undefined {
    return this.#forks.get(fork);
  }

  has(image: string): boolean {
    return this.#of(image) !== undefined;
  }

  async without<T>(image: string, remove: () => Promise<T>): Promise<T> {
    const session = this.#of(image);
    if (session === undefined) return remove();
    const removal = await session.without(remove);
    this.#forks.delete(session.request.fork);
    return removal;
  }

  #of(image: string): ForkSession | undefined {
    return this.all.find(({ record }) => record.image === image);
  }
}

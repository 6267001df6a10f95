/**
 * A host that has joined a fork, and whose operator has since removed the root from its peers: nothing comes from there
 * any more, and nobody ends the fork here. Silence alone means nothing, because a silent root may come back.
 *
 * Peers are read when the daemon starts. It then undoes a fork that is not committed here: its clones have never run. A
 * committed fork goes on if every page is here, and its image is given up otherwise (`rootRemoved`). Its clones that
 * have not run are ended. Then this host ends its part of the fork, as the coordinator would.
 */
import { toMigrationError } from '../../../domain/errors.js';
import type { Log } from '../../../kit/log.js';

export const ROOT_IS_REMOVED = 'the root of a fork is no peer any more: this host ends its part by itself';

const TRY_AGAIN_MS = 5_000;

/** Returns the host that has the image of a fork which this host has joined, if it is no peer any more. */
export function removedRootOf(isPeer: (host: string) => boolean, origin?: { readonly host: string }): string | null {
  return origin === undefined || isPeer(origin.host) ? null : origin.host;
}

/** Ends committed forks without their root. What is under way keeps a fork for some time, so each is tried again. */
export class ForksWithoutRoot {
  readonly #log: Log;
  /** Rejects as long as pages are copied. */
  readonly #end: (fork: string) => Promise<void>;
  readonly #timers = new Set<NodeJS.Timeout>();
  #isClosed = false;

  constructor(log: Log, end: (fork: string) => Promise<void>) {
    this.#log = log;
    this.#end = end;
  }

  /** Nobody waits for it: a QEMU may not answer. */
  add(fork: string): void {
    void this.#try(fork);
  }

  async #try(fork: string): Promise<void> {
    if (this.#isClosed) return;
    try {
      await this.#end(fork);
      this.#log.info({ fork }, 'the part of this host in a fork has ended without its root');
    } catch (thrown) {
      const err = toMigrationError(thrown);
      // Pages that are still copied within this host are no news.
      if (err.code !== 'CONFLICT') this.#log.warn({ fork, err }, 'a fork without its root cannot be ended yet');
      this.#addLater(fork);
    }
  }

  close(): void {
    this.#isClosed = true;
    for (const timer of this.#timers) clearTimeout(timer);
    this.#timers.clear();
  }

  #addLater(fork: string): void {
    if (this.#isClosed) return;
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      void this.#try(fork);
    }, TRY_AGAIN_MS);
    timer.unref();
    this.#timers.add(timer);
  }
}

/**
 * The forks that this host has joined and whose commit it has not heard of. The host of the image decides, and the
 * coordinator tells this host. If nothing comes for a while this host asks by itself, for ever, so that a coordinator
 * that is gone leaves nothing behind here. If that host is no peer any more, the fork is discarded: no clone of it has
 * run here. This host never commits by itself.
 */
import { toMigrationError } from '../../../domain/errors.js';
import type { ForkDecision } from '../../../engine/ports/fork.js';
import type { Log } from '../../../kit/log.js';

const ASK_MS_FIRST = 30_000;
const ASK_MS_MAX = 120_000;

export interface UndecidedOptions {
  readonly log: Log;
  /** Asks the host whose record decides. */
  readonly ask: (host: string, fork: string) => Promise<{ readonly decision: ForkDecision }>;
  /** False: the operator has removed that host, so that nothing comes from there any more. */
  readonly isPeer: (host: string) => boolean;
  /** False once the fork is committed here, or gone. */
  readonly isUndecided: (fork: string) => boolean;
  readonly discard: (fork: string) => Promise<void>;
}

interface Watched {
  readonly host: string;
  /** The answer was `committed`, which is final. It has been logged. */
  isCommitted: boolean;
  /** Null: an answer is awaited. */
  timer: NodeJS.Timeout | null;
  waitMs: number;
}

export class UndecidedForks {
  readonly #options: UndecidedOptions;
  readonly #watched = new Map<string, Watched>();

  constructor(options: UndecidedOptions) {
    this.#options = options;
  }

  /** `host` decides. */
  watch(fork: string, host: string): void {
    if (this.#watched.has(fork)) return;
    const watched: Watched = { host, isCommitted: false, timer: null, waitMs: ASK_MS_FIRST };
    this.#watched.set(fork, watched);
    this.#askLater(fork, watched);
  }

  /** A call of the fork has come, so its coordinator is at work. */
  heard(fork: string): void {
    const watched = this.#watched.get(fork);
    if (watched === undefined) return;
    watched.waitMs = ASK_MS_FIRST;
    if (watched.timer === null) return;
    clearTimeout(watched.timer);
    this.#askLater(fork, watched);
  }

  /** The fork is committed here, or gone. */
  forget(fork: string): void {
    const timer = this.#watched.get(fork)?.timer ?? null;
    if (timer !== null) clearTimeout(timer);
    this.#watched.delete(fork);
  }

  close(): void {
    for (const fork of [...this.#watched.keys()]) this.forget(fork);
  }

  #askLater(fork: string, watched: Watched): void {
    watched.timer = setTimeout(() => {
      watched.timer = null;
      void this.#ask(fork, watched);
    }, watched.waitMs);
    watched.timer.unref();
    watched.waitMs = Math.min(watched.waitMs * 2, ASK_MS_MAX);
  }

  async #ask(fork: string, watched: Watched): Promise<void> {
    const { log, ask, isPeer, isUndecided, discard } = this.#options;
    const { host } = watched;
    try {
      const { decision } = isPeer(host) ? await ask(host, fork) : ({ decision: 'discarded' } as const);
      if (this.#watched.get(fork) !== watched) return;
      if (!isUndecided(fork)) return this.forget(fork);
      if (decision === 'committed') {
        if (!watched.isCommitted)
          log.warn({ fork, host }, 'a fork is committed: its clones here wait for the coordinator');
        watched.isCommitted = true;
      }
      if (decision === 'discarded') {
        log.warn({ fork, host }, 'this host has no part in a fork: its clones here are removed');
        await discard(fork);
        return this.forget(fork);
      }
    } catch (error) {
      log.warn({ fork, host, err: toMigrationError(error) }, 'it is not known yet what becomes of a fork');
    }
    if (this.#watched.get(fork) === watched) this.#askLater(fork, watched);
  }
}

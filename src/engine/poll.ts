/**
 * Intervals for polling work under way. The first interval is `pollMsFirst`; later ones grow up to `pollMs`. Towards
 * the end the interval is half of the time left, so that the end is noticed within milliseconds, however long the work
 * was.
 */
import type { EngineLimits } from './walk-context.js';

export class PollPace {
  readonly #limits: Pick<EngineLimits, 'pollMsFirst' | 'pollMs'>;
  #grownMs: number;

  constructor(limits: Pick<EngineLimits, 'pollMsFirst' | 'pollMs'>) {
    this.#limits = limits;
    this.#grownMs = limits.pollMsFirst;
  }

  /** Returns the next interval. `secondsLeft` is the estimate of the work itself; null: unknown. */
  nextMs(secondsLeft: number | null): number {
    const { pollMsFirst, pollMs } = this.#limits;
    const grownMs = this.#grownMs;
    this.#grownMs = Math.min(grownMs * 2, pollMs);
    if (secondsLeft === null) return grownMs;
    return Math.max(pollMsFirst, Math.min(grownMs, (secondsLeft * 1000) / 2));
  }
}

/**
 * When to look again at work that somebody else does: at first after `pollMsFirst`, then ever more rarely up to
 * `pollMs`; towards the end after half of the time that is left, so that the end is noticed within some milliseconds
 * however long the work was.
 */
import type { EngineLimits } from './walk-context.js';

export class PollPace {
  readonly #limits: Pick<EngineLimits, 'pollMsFirst' | 'pollMs'>;
  #grownMs: number;

  constructor(limits: Pick<EngineLimits, 'pollMsFirst' | 'pollMs'>) {
    this.#limits = limits;
    this.#grownMs = limits.pollMsFirst;
  }

  /** `secondsLeft` as the work itself estimates it; null: unknown. */
  nextMs(secondsLeft: number | null): number {
    const { pollMsFirst, pollMs } = this.#limits;
    const grownMs = this.#grownMs;
    this.#grownMs = Math.min(grownMs * 2, pollMs);
    if (secondsLeft === null) return grownMs;
    return Math.max(pollMsFirst, Math.min(grownMs, (secondsLeft * 1000) / 2));
  }
}

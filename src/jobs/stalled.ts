/**
 * The retries of jobs that need recovery. Its daemon never gives up a committed move or fork: it tries again and again,
 * with growing waits, until the job goes on or a user gives it up. `hurry` ends the current wait.
 */
import type { Clock, Random } from '../engine/ports/clock.js';
import type { Outcome } from '../engine/walk.js';
import type { Job } from './job.js';

export interface StalledOptions {
  readonly clock: Clock;
  readonly random: Random;
  /** First and longest wait between two attempts, before jitter. */
  readonly limits: { readonly stalledMsFirst: number; readonly stalledMsMax: number };
  /** Aborted when the daemon closes. */
  readonly signal: AbortSignal;
}

/** Each wait is longer or shorter by up to this part, so that many jobs do not ask a host that is back all at once. */
const JITTER = 0.25;
const JITTER_BYTES = 2;

export class StalledJobs {
  readonly #options: StalledOptions;
  readonly #waits = new Map<Job, AbortController>();

  constructor(options: StalledOptions) {
    this.#options = options;
  }

  /**
   * Repeats `attempt` until its outcome is another one than `stalled`. `onFailure` gets the error of each attempt that
   * failed. Resolves with `halted` soon after the daemon has begun to close.
   */
  async retry<Report>(
    job: Job,
    attempt: () => Promise<Outcome<Report>>,
    onFailure: (outcome: Extract<Outcome<Report>, { kind: 'stalled' }>) => void,
  ): Promise<Outcome<Report>> {
    const { limits, signal } = this.#options;
    for (let waitMs = limits.stalledMsFirst; ; waitMs = Math.min(waitMs * 2, limits.stalledMsMax)) {
      const isHurried = await this.#wait(job, waitMs);
      if (signal.aborted) return { kind: 'halted' };
      if (isHurried) waitMs = limits.stalledMsFirst / 2;
      const outcome = await attempt();
      if (outcome.kind !== 'stalled') return outcome;
      onFailure(outcome);
    }
  }

  /** Begins the next attempt at once. Does nothing if the job does not wait for one. */
  hurry(job: Job): void {
    this.#waits.get(job)?.abort();
  }

  async #wait(job: Job, ms: number): Promise<boolean> {
    const { clock, signal } = this.#options;
    const hurry = new AbortController();
    this.#waits.set(job, hurry);
    await clock.sleep(this.#jittered(ms), AbortSignal.any([signal, hurry.signal])).catch(() => undefined);
    this.#waits.delete(job);
    return hurry.signal.aborted;
  }

  #jittered(ms: number): number {
    const fraction = Number.parseInt(this.#options.random.hex(JITTER_BYTES), 16) / 2 ** (8 * JITTER_BYTES);
    return ms * (1 - JITTER + 2 * JITTER * fraction);
  }
}

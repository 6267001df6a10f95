/** Retries the undo steps that failed when a job ended, because their host did not answer, until they succeed. */

import { toMigrationError } from '../domain/errors.js';
import type { Clock } from '../engine/ports/clock.js';
import type { AnyStepName } from '../engine/ports/journal.js';
import { isWorthAnotherTry } from '../engine/walk.js';
import type { Job } from './job.js';
import type { ReplayableJournal } from './journal.js';

export interface LeftoverOptions {
  readonly clock: Clock;
  readonly journal: ReplayableJournal;
  /** First and longest wait between two tries. */
  readonly limits: { readonly leftoverMsFirst: number; readonly leftoverMsMax: number };
  /** Aborted when the daemon closes. */
  readonly signal: AbortSignal;
  readonly undoStep: (job: Job, step: AnyStepName) => Promise<void>;
  readonly warn: (message: string, error: unknown, job: string) => void;
}

export class Leftovers {
  readonly #options: LeftoverOptions;
  readonly #underWay = new Set<Promise<void>>();

  constructor(options: LeftoverOptions) {
    this.#options = options;
  }

  /** Starts the retries for the job in the background. */
  clear(job: Job): void {
    for (const step of job.history.leftovers) {
      const clearing: Promise<void> = this.#clear(job, step).finally(() => this.#underWay.delete(clearing));
      this.#underWay.add(clearing);
    }
  }

  /** Resolves when no retry runs any more, which is soon after the signal. */
  async rest(): Promise<void> {
    await Promise.all(this.#underWay);
  }

  async #clear(job: Job, step: AnyStepName): Promise<void> {
    const { clock, journal, limits, signal, undoStep, warn } = this.#options;
    const { leftoverMsFirst, leftoverMsMax } = limits;
    for (let waitMs = leftoverMsFirst; !signal.aborted; waitMs = Math.min(waitMs * 2, leftoverMsMax)) {
      await clock.sleep(waitMs, signal).catch(() => undefined);
      if (signal.aborted) return;
      try {
        await undoStep(job, step);
      } catch (thrown) {
        const error = toMigrationError(thrown);
        if (isWorthAnotherTry(error)) continue;
        warn(`cannot undo ${step}; giving up`, error, job.view.id);
      }
      try {
        await journal.append({ type: 'cleared', job: job.view.id, step });
        job.history.leftovers.delete(step);
        return;
      } catch (error) {
        warn(`cannot journal that ${step} is undone`, error, job.view.id);
      }
    }
  }
}

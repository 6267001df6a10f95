/** Shows the progress of a walk in the view of its job, and in the views of the jobs that wait behind it. */
import type { JobView } from '../domain/job.js';
import type { RunObserver } from '../engine/walk-context.js';
import { isHeldUp, type Job, standing, type ViewChange } from './job.js';
import type { JobQueue } from './queue.js';
import type { JobTable } from './table.js';

interface ObserverParts {
  readonly jobs: JobTable;
  readonly queue: JobQueue;
  readonly warn: (message: string, error: unknown) => void;
}

export function observerOf(job: Job, { jobs, queue, warn }: ObserverParts): RunObserver {
  const change = (to: ViewChange): void => jobs.change(job, to);
  return {
    // No walk goes forward to a step of an earlier build.
    onStep: (step) => change({ step: step as JobView['step'] }),
    onProgress: (progress) => {
      change({ progress });
      for (const other of queue.behind(job)) jobs.change(other, { progress });
    },
    onCommitBegun: () => {
      job.isCommitBegun = true;
    },
    onCommitted: () => {
      job.isCommitBegun = true;
      change({ isCommitted: true });
    },
    onRecovering: (error) => {
      if (error !== null) change({ state: 'recovering', error: error.toJSON(), ...standing(job.view) });
      else if (isHeldUp(job.view.state)) change({ state: 'running', error: null });
    },
    onWarning: warn,
  };
}

/**
 * Watching a job to its end. A daemon that restarts in between takes its jobs up again, so a lost connection is tried
 * again for a while.
 */

import { type ApiClient, DaemonUnreachable } from '../api/client.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { type ForkJobView, isEnded, type JobView, type MigrationJobView } from '../domain/job.js';

const RECONNECT_MS = 500;
const RECONNECT_FOR_MS = 15_000;

/**
 * The view of a job that has ended, or the last one seen when `signal` aborts. Throws DaemonUnreachable when the daemon
 * stays away.
 */
export async function followJob(
  client: ApiClient,
  id: string,
  onView: (view: JobView) => void,
  signal?: AbortSignal,
): Promise<JobView> {
  let last: JobView | null = null;
  let awayAtMs: number | null = null;
  for (;;) {
    try {
      await client.followJob(
        id,
        (view) => {
          last = view;
          awayAtMs = null;
          onView(view);
          return isEnded(view.state);
        },
        signal,
      );
      last = await client.get<JobView>(`/v1/jobs/${id}`);
      if (isEnded(last.state) || signal?.aborted === true) return last;
    } catch (error) {
      if (signal?.aborted === true && last !== null) return last;
      awayAtMs ??= performance.now();
      if (!(error instanceof DaemonUnreachable) || performance.now() - awayAtMs > RECONNECT_FOR_MS) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS));
  }
}

/** What a job that did not succeed means for its VM, as an error to print. */
export function jobError(job: JobView): MigrationError {
  return job.kind === 'fork' ? forkError(job) : migrationError(job);
}

function migrationError(job: MigrationJobView): MigrationError {
  const { cause, context } = causeOf(job);
  switch (job.state) {
    case 'cancelled':
      return new MigrationError('CANCELLED', `${job.vm} runs on ${job.source}: the migration was cancelled`, context);
    case 'needsRecovery':
      return new MigrationError(
        'NEEDS_RECOVERY',
        `${job.vm} belongs to ${job.target} and waits for memory from ${job.source}`,
        {
          ...context,
          remedy: `when the hosts reach each other again: vmigrate --recover ${job.id}`,
        },
      );
    case 'lost':
      return new MigrationError('VM_LOST', `${job.vm} can run nowhere any more`, context);
    default:
      return new MigrationError(
        toMigrationError(cause).code,
        `${job.vm} runs on ${job.source}: the migration failed`,
        context,
      );
  }
}

function forkError(job: ForkJobView): MigrationError {
  const { cause, context } = causeOf(job);
  switch (job.state) {
    case 'cancelled':
      return new MigrationError('CANCELLED', `the fork of ${job.vm} was cancelled: there is no clone`, context);
    case 'needsRecovery':
      return new MigrationError('NEEDS_RECOVERY', `the fork of ${job.vm} took place, and its image is not complete`, {
        ...context,
        remedy: `when the cause is seen to: vfork --recover ${job.id}`,
      });
    case 'lost':
      return new MigrationError(
        'VM_LOST',
        `the image of ${job.vm} can never be complete: its clones (${job.clones.length}) have been ended, ${job.vm} is not affected`,
        context,
      );
    default:
      return new MigrationError(
        toMigrationError(cause).code,
        `the fork of ${job.vm} failed: there is no clone`,
        context,
      );
  }
}

function causeOf(job: JobView) {
  const cause =
    job.error === null || job.error === undefined ? undefined : MigrationError.fromJSON(job.error, `job ${job.id}`);
  const context = {
    ...(cause === undefined ? {} : { cause }),
    ...(cause?.details === undefined ? {} : { details: cause.details }),
  };
  return { cause, context };
}

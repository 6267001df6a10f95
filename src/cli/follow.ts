/**
 * Watches a job until it ends. A restarted daemon resumes its jobs, so a lost connection is retried for a while.
 */

import { type ApiClient, DaemonUnreachable } from '../api/client.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { type ForkJobView, isEnded, type JobView, type MigrationJobView } from '../domain/job.js';

const RECONNECT_MS = 500;
const RECONNECT_FOR_MS = 15_000;

/**
 * Returns the view of the ended job, or the last view seen if `signal` aborts. Throws DaemonUnreachable if the daemon
 * does not come back.
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
      await client
        .followJob(
          id,
          (view) => {
            last = view;
            awayAtMs = null;
            onView(view);
            return isEnded(view.state);
          },
          signal,
        )
        .catch(unlessCrowded);
      last = await client.get<JobView>(`/v1/jobs/${id}`);
      onView(last);
      if (isEnded(last.state) || signal?.aborted === true) return last;
    } catch (error) {
      if (signal?.aborted === true && last !== null) return last;
      awayAtMs ??= performance.now();
      if (!(error instanceof DaemonUnreachable) || performance.now() - awayAtMs > RECONNECT_FOR_MS) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS));
  }
}

/** The daemon has no event stream to give at present. The job goes on, and is asked for now and then. */
function unlessCrowded(error: unknown): void {
  if (!(error instanceof MigrationError && error.code === 'CONFLICT')) throw error;
}

/**
 * Returns the error to print for a job that did not succeed, or does not advance at present; it says what became of the
 * VM, and what to do.
 */
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
          remedy: `then the job goes on by itself; to try at once: vmigrate --recover ${job.id}`,
        },
      );
    case 'recovering':
      return new MigrationError(
        toMigrationError(cause).code,
        `${job.vm} belongs to ${job.target}, and its move is being recovered`,
        context,
      );
    case 'lost':
      return new MigrationError(
        'VM_LOST',
        cause?.code === 'DAMAGED'
          ? `${job.vm} stands still on ${job.target}: its memory is damaged`
          : `${job.vm} is lost: it cannot run on any host`,
        context,
      );
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
      return new MigrationError('CANCELLED', `the fork of ${job.vm} was cancelled: no clone exists`, context);
    case 'needsRecovery':
      return new MigrationError('NEEDS_RECOVERY', `the fork of ${job.vm} is committed, but its image is not complete`, {
        ...context,
        remedy: `then the job goes on by itself; to try at once: vfork --recover ${job.id}`,
      });
    case 'recovering':
      return new MigrationError(
        toMigrationError(cause).code,
        `the fork of ${job.vm} is committed, and its image is being recovered`,
        context,
      );
    case 'lost':
      if (job.cloneCount === 0) {
        return new MigrationError(
          'VM_LOST',
          `the image of ${job.vm} was not copied; it is whole on ${job.source}`,
          context,
        );
      }
      return new MigrationError(
        'VM_LOST',
        `the image of ${job.vm} cannot be completed: its ${job.clones.length} clones ended; ${job.vm} is unaffected`,
        context,
      );
    default:
      return new MigrationError(toMigrationError(cause).code, `the fork of ${job.vm} failed: no clone exists`, context);
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

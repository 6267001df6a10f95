/** The exit codes of the commands. Scripts depend on them; tests check each one. */
import { DaemonUnreachable } from '../api/client.js';
import { MigrationError } from '../domain/errors.js';
import type { JobState } from '../domain/job.js';

export const EXIT = {
  done: 0,
  /** The VM still runs on the source. */
  failed: 1,
  usage: 2,
  refused: 3,
  /** The VM has moved, but nothing has arrived for long. The job goes on by itself when the cause is gone. */
  needsRecovery: 4,
  unreachable: 5,
  /** The VM, or the clones of the fork, cannot run any more. */
  lost: 6,
} as const;

export type ExitCode = (typeof EXIT)[keyof typeof EXIT];

export function exitCodeOf(error: unknown): ExitCode {
  if (error instanceof DaemonUnreachable) return EXIT.unreachable;
  if (!(error instanceof MigrationError)) return EXIT.failed;
  switch (error.code) {
    case 'USAGE':
    case 'SPEC_INVALID':
      return EXIT.usage;
    case 'PREFLIGHT_REFUSED':
      return EXIT.refused;
    case 'NEEDS_RECOVERY':
      return EXIT.needsRecovery;
    case 'VM_LOST':
      return EXIT.lost;
    default:
      return EXIT.failed;
  }
}

/** The exit code for each state of a job that has ended, or that the user stopped watching. */
const OF_JOB: { readonly [S in JobState]: ExitCode } = {
  queued: EXIT.done,
  running: EXIT.done,
  recovering: EXIT.done,
  done: EXIT.done,
  failed: EXIT.failed,
  cancelled: EXIT.failed,
  lost: EXIT.lost,
  needsRecovery: EXIT.needsRecovery,
};

export function exitCodeOfJob(state: JobState): ExitCode {
  return OF_JOB[state];
}

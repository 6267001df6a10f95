/**
 * Shows a job to the user until it ends: progress line, Ctrl-C, report or error, exit code. Every kind of job uses this
 * function.
 */
import type { JobView } from '../domain/job.js';
import { type ExitCode, exitCodeOfJob } from './exit-codes.js';
import { followJob, jobError } from './follow.js';
import { type CommonOptions, client } from './program.js';
import { ProgressLine, print, printError } from './terminal.js';

export interface AttendOptions extends CommonOptions {
  readonly detach?: boolean;
}

/** `onDone` prints the report of a job that succeeded. */
export async function attend(
  program: string,
  started: JobView,
  options: AttendOptions,
  outcome: { code: ExitCode },
  onDone: (job: JobView) => Promise<void> | void,
): Promise<void> {
  const output = { isJson: options.json === true };
  if (options.detach === true) {
    print(output, started, ({ id }) => `${id}\n`);
    return;
  }
  const api = client(options);
  const progress = new ProgressLine(output);
  const detached = new AbortController();
  let interrupts = 0;
  const onInterrupt = (): void => {
    interrupts++;
    progress.clear();
    if (interrupts > 1) {
      detached.abort();
      return;
    }
    process.stderr.write(`cancelling ${started.id}; press Ctrl-C again to stop watching it\n`);
    api.post(`/v1/jobs/${started.id}/cancel`).catch((error: unknown) => printError(program, { isJson: false }, error));
  };
  process.on('SIGINT', onInterrupt);
  try {
    const job = await followJob(api, started.id, (view) => progress.show(view), detached.signal);
    progress.clear();
    outcome.code = exitCodeOfJob(job.state);
    if (job.state === 'done' && job.report !== null) await onDone(job);
    else if (detached.signal.aborted)
      print(output, job, ({ id }) => `${id} continues in the daemon; to watch it: vmctl job ${id} --follow\n`);
    else printError(program, output, jobError(job));
  } finally {
    process.off('SIGINT', onInterrupt);
    progress.clear();
  }
}

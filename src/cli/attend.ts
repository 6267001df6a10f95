/**
 * A job from its start to its end, in front of a person: progress, Ctrl-C, report or error, exit code. The same for
 * every kind of job.
 */
import type { JobView } from '../domain/job.js';
import { type ExitCode, exitCodeOfJob } from './exit-codes.js';
import { followJob, jobError } from './follow.js';
import { type CommonOptions, client } from './program.js';
import { ProgressLine, print, printError } from './terminal.js';

export interface AttendOptions extends CommonOptions {
  readonly detach?: boolean;
}

/** `onDone` shows what a job that succeeded has to show. */
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
    process.stderr.write(`cancelling ${started.id}; Ctrl-C again leaves it to the daemon\n`);
    api.post(`/v1/jobs/${started.id}/cancel`).catch((error: unknown) => printError(program, { isJson: false }, error));
  };
  process.on('SIGINT', onInterrupt);
  try {
    const job = await followJob(api, started.id, (view) => progress.show(view), detached.signal);
    progress.clear();
    outcome.code = exitCodeOfJob(job.state);
    if (job.state === 'done' && job.report !== null) await onDone(job);
    else if (detached.signal.aborted)
      print(output, job, ({ id }) => `${id} goes on without us: vmctl job ${id} --follow\n`);
    else printError(program, output, jobError(job));
  } finally {
    process.off('SIGINT', onInterrupt);
    progress.clear();
  }
}

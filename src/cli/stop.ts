/** The words of `vmctl stop`. */
import { MigrationError } from '../domain/errors.js';
import type { StopResult } from '../domain/vm.js';
import { plain } from './render.js';
import { type Output, ProgressLine } from './terminal.js';

const SECONDS_MAX = 3600;
const SHOWN_EVERY_MS = 1_000;

/** Throws USAGE unless the text is a number of seconds from 0 to 3600. */
export function secondsOf(text: string): number {
  const seconds = /^\d{1,4}(\.\d{1,3})?$/.test(text) ? Number(text) : Number.NaN;
  if (seconds <= SECONDS_MAX) return seconds;
  throw new MigrationError('USAGE', `--timeout is a number of seconds from 0 to ${SECONDS_MAX}, not "${text}"`);
}

/** Shows on a terminal how long the guest has been waited for. */
export async function showWait<T>(vm: string, timeoutS: number, output: Output, stopping: Promise<T>): Promise<T> {
  const progress = new ProgressLine(output);
  const beganAtMs = performance.now();
  const show = () => {
    const seconds = Math.floor((performance.now() - beganAtMs) / 1000);
    progress.text(
      `${vm}: the guest is shutting down, ${seconds} of ${timeoutS} s (--force ends it at once, Ctrl-C only this wait)`,
    );
  };
  const timer = setInterval(show, SHOWN_EVERY_MS);
  try {
    return await stopping;
  } finally {
    clearInterval(timer);
    progress.clear();
  }
}

export function stopText({ name, how, exitCode, reason }: StopResult, timeoutS: number): string {
  const code = exitCode === null ? '' : ` (exit code ${exitCode})`;
  const words: { readonly [W in StopResult['how']]: string } = {
    shutDown: `: the guest has shut down${code}`,
    noReaction: `: the guest did not react to its power button within ${timeoutS} s, so it was ended`,
    ended: ': its power button was not pressed',
    killed: ': killed',
    removed: `: it had ended before${code}`,
    endedMeanwhile: `: it ended while the guest was asked to shut down: ${reason ?? 'for an unknown reason'}${code}`,
  };
  // A daemon of a newer build may know further ways.
  return `stopped ${plain(name)}${plain(words[how] ?? '')}\n`;
}

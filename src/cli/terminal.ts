/**
 * Decides where output goes: results to stdout, everything else to stderr. With --json, stdout gets one document and
 * nothing else.
 */

import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { JobView } from '../domain/job.js';
import { errorText } from './error-text.js';
import { type ExitCode, exitCodeOf } from './exit-codes.js';
import { plain, progressLines } from './render.js';

const WAITING_SHOWN_MS = 1_000;
const CLEAR_LINE = '\r\u001b[K';
const LINE_UP_CLEARED = '\u001b[A\u001b[K';

export interface Output {
  readonly isJson: boolean;
}

/** Prints the command's result: the value as JSON, or the text that `text` makes of it for a person. */
export function print<T>(output: Output, value: T, text: (value: T) => string): void {
  process.stdout.write(output.isJson ? `${JSON.stringify(value, null, 2)}\n` : text(value));
}

export function printError(program: string, output: Output, thrown: unknown): ExitCode {
  const error = thrown instanceof MigrationError ? thrown : toMigrationError(thrown);
  if (output.isJson) process.stdout.write(`${JSON.stringify({ error: error.toJSON() }, null, 2)}\n`);
  else process.stderr.write(errorText(program, error.toJSON()));
  return exitCodeOf(thrown);
}

/** Says on a terminal what a command waits for, if that takes longer than a moment. */
export async function whileWaiting<T>(output: Output, text: string, work: Promise<T>): Promise<T> {
  const { stderr } = process;
  if (!stderr.isTTY || output.isJson) return work;
  let isShown = false;
  const timer = setTimeout(() => {
    isShown = true;
    stderr.write(text);
  }, WAITING_SHOWN_MS);
  try {
    return await work;
  } finally {
    clearTimeout(timer);
    if (isShown) stderr.write(CLEAR_LINE);
  }
}

/**
 * Status lines that each update overwrites. They have no more lines than fit on the terminal, and are not printed if
 * stderr is not a terminal.
 */
export class ProgressLine {
  private readonly isShown: boolean;
  private shownCount = 0;

  constructor(
    output: Output,
    private readonly stream: NodeJS.WriteStream = process.stderr,
  ) {
    this.isShown = stream.isTTY && !output.isJson;
  }

  show(job: JobView): void {
    if (this.isShown) this.lines(progressLines(job));
  }

  text(text: string): void {
    if (this.isShown) this.lines([plain(text)]);
  }

  clear(): void {
    this.lines([]);
  }

  private lines(texts: readonly string[]): void {
    if (this.shownCount > 0) this.stream.write(`${CLEAR_LINE}${LINE_UP_CLEARED.repeat(this.shownCount - 1)}`);
    const widthMax = Math.max(20, (this.stream.columns ?? 80) - 1);
    const shown = texts.slice(0, Math.max(1, (this.stream.rows ?? 24) - 1)).map((text) => text.slice(0, widthMax));
    if (shown.length > 0) this.stream.write(shown.join('\n'));
    this.shownCount = shown.length;
  }
}

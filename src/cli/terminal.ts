/**
 * Where output goes: results to stdout, everything else to stderr; with --json one document on stdout and nothing
 * besides.
 */

import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { JobView } from '../domain/job.js';
import { errorText } from './error-text.js';
import { type ExitCode, exitCodeOf } from './exit-codes.js';
import { progressLine } from './render.js';

const CLEAR_LINE = '\r\u001b[K';

export interface Output {
  readonly isJson: boolean;
}

/** The command's result: the value itself as JSON, or a person's text made from it. */
export function print<T>(output: Output, value: T, text: (value: T) => string): void {
  process.stdout.write(output.isJson ? `${JSON.stringify(value, null, 2)}\n` : text(value));
}

export function printError(program: string, output: Output, thrown: unknown): ExitCode {
  const error = thrown instanceof MigrationError ? thrown : toMigrationError(thrown);
  if (output.isJson) process.stdout.write(`${JSON.stringify({ error: error.toJSON() }, null, 2)}\n`);
  else process.stderr.write(errorText(program, error.toJSON()));
  return exitCodeOf(thrown);
}

/** A line that is written over; silent where nobody watches. */
export class ProgressLine {
  private readonly isShown: boolean;
  private width = 0;

  constructor(
    output: Output,
    private readonly stream: NodeJS.WriteStream = process.stderr,
  ) {
    this.isShown = stream.isTTY && !output.isJson;
  }

  show(job: JobView): void {
    if (!this.isShown) return;
    const line = progressLine(job).slice(0, Math.max(20, (this.stream.columns ?? 80) - 1));
    this.stream.write(`${CLEAR_LINE}${line}`);
    this.width = line.length;
  }

  clear(): void {
    if (this.isShown && this.width > 0) this.stream.write(CLEAR_LINE);
    this.width = 0;
  }
}

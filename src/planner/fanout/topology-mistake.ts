import { MigrationError } from '../../domain/errors.js';

export interface Place {
  readonly file: string;
  /** Counts from 1. Null: the mistake is in no single line. */
  readonly line: number | null;
}

const SHOWN_CHARS_MAX = 80;

/** Returns a text of the file for a message: short, in one line, without characters that a terminal would obey. */
export function shown(text: string): string {
  const line = text.replace(/[^\x20-\x7e\u00a0-\uffff]+/g, ' ');
  return line.length <= SHOWN_CHARS_MAX ? line : `${line.slice(0, SHOWN_CHARS_MAX - 1)}…`;
}

export function topologyMistake({ file, line }: Place, found: string, expected: string): MigrationError {
  const where = line === null ? shown(file) : `${shown(file)}, line ${line}`;
  return new MigrationError('SPEC_INVALID', `${where}: found ${found}; expected ${expected}`, {
    remedy: 'correct the file; docs/CLONES.md, "How the image gets to the hosts", describes its format',
    details: line === null ? { file } : { file, line },
  });
}

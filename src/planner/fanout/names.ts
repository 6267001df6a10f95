/**
 * Names as Slurm writes them: `a`, `node[01-16,20]`, `rack[0-1]node[0-3]`, separated by commas or blanks. The number of
 * digits of the first number of a range is kept: `[08-10]` is 08, 09, 10.
 */
import { TOPOLOGY_NAMES_MAX } from './topology.js';
import { type Place, shown, topologyMistake } from './topology-mistake.js';

export const NAME_CHARS_MAX = 64;
const NAME = /^[^\s,[\]="'#\\]+$/;

export function isName(text: string): boolean {
  return text.length <= NAME_CHARS_MAX && NAME.test(text);
}

interface Range {
  readonly from: number;
  readonly to: number;
  readonly digits: number;
}

/** Throws SPEC_INVALID. `countMax`: how many names the file may still have. */
export function expandNames(text: string, place: Place, countMax: number): string[] {
  const names: string[] = [];
  for (const item of itemsOf(text, place)) {
    const parts = partsOf(item, place);
    const count = parts.reduce((product, part) => product * (typeof part === 'string' ? 1 : countOf(part)), 1);
    if (names.length + count > countMax) {
      throw topologyMistake(place, `more names by ${shown(item)}`, `at most ${TOPOLOGY_NAMES_MAX} names in the file`);
    }
    let made = [''];
    for (const part of parts) {
      const ends = typeof part === 'string' ? [part] : part.flatMap(numbersOf);
      made = made.flatMap((start) => ends.map((end) => start + end));
      // Before the next part: each of thousands of brackets would multiply the work, and each makes names longer.
      if ((made[0] ?? '').length > NAME_CHARS_MAX) break;
    }
    const wrong = made.find((name) => !isName(name));
    if (wrong !== undefined) throw topologyMistake(place, `the name ${shown(wrong)}`, nameExpected);
    for (const name of made) names.push(name);
  }
  return names;
}

export const nameExpected = `a name of at most ${NAME_CHARS_MAX} characters, such as node7 or node[01-16,20]`;

/** Splits at commas and blanks that are not in brackets. */
function itemsOf(text: string, place: Place): string[] {
  const items: string[] = [];
  let start = 0;
  let isInside = false;
  for (let at = 0; at <= text.length; at++) {
    const char = text[at] ?? ',';
    if (at < text.length && char === '[') {
      if (isInside) throw topologyMistake(place, `[ within brackets in ${shown(text)}`, nameExpected);
      isInside = true;
    } else if (char === ']') {
      if (!isInside) throw topologyMistake(place, `] without [ in ${shown(text)}`, nameExpected);
      isInside = false;
    } else if (at === text.length || (!isInside && /[,\s]/.test(char))) {
      if (at > start) items.push(text.slice(start, at));
      start = at + 1;
    }
  }
  if (isInside) throw topologyMistake(place, `[ without ] in ${shown(text)}`, nameExpected);
  return items;
}

/** Returns the texts outside of the brackets and the ranges inside, in their order. */
function partsOf(item: string, place: Place): (string | readonly Range[])[] {
  return item.split(/[[\]]/).map((part, index) => (index % 2 === 0 ? part : rangesOf(part, item, place)));
}

/** Larger numbers could not be counted through. */
const RANGE = /^(\d{1,9})(?:-(\d{1,9}))?$/;

function rangesOf(text: string, item: string, place: Place): Range[] {
  return text.split(',').map((range) => {
    const match = RANGE.exec(range.trim());
    const from = Number(match?.[1]);
    const to = Number(match?.[2] ?? match?.[1]);
    if (match === null || to < from) {
      throw topologyMistake(
        place,
        `the range ${shown(range)} in ${shown(item)}`,
        'numbers or ranges, such as [01-16,20]',
      );
    }
    return { from, to, digits: (match[1] ?? '').length };
  });
}

function countOf(ranges: readonly Range[]): number {
  return ranges.reduce((sum, { from, to }) => sum + to - from + 1, 0);
}

function numbersOf({ from, to, digits }: Range): string[] {
  return Array.from({ length: to - from + 1 }, (_, index) => String(from + index).padStart(digits, '0'));
}

/**
 * Reads Slurm's topology.conf for its tree plugin. Accepts what Slurm's own parser accepts: keys in any case, values in
 * quotes, comments from an unescaped #, and lines that go on after a backslash. A key that comes twice in a line, of
 * which Slurm uses the last, is an error here.
 */
import type { SwitchDraft, TopologyDraft } from './build-topology.js';
import { expandNames, isName, nameExpected } from './names.js';
import { TOPOLOGY_NAMES_MAX } from './topology.js';
import { type Place, shown, topologyMistake } from './topology-mistake.js';

const KEYS = ['SwitchName', 'Switches', 'Nodes', 'LinkSpeed'] as const;
type Key = (typeof KEYS)[number];
const LINE_EXPECTED = 'SwitchName=NAME, then Switches=NAMES or Nodes=NAMES, and perhaps LinkSpeed=NUMBER';

/** Throws SPEC_INVALID. */
export function readSlurmConf(file: string, text: string): TopologyDraft {
  const switches: SwitchDraft[] = [];
  let nameCount = 0;
  for (const { line, text: content } of logicalLines(text)) {
    const place = { file, line };
    const values = valuesOf(content, place);
    if (values === null) continue;
    const name = values.get('SwitchName') ?? '';
    if (!isName(name)) throw topologyMistake(place, `SwitchName=${shown(name)}`, nameExpected);
    const namesOf = (key: 'Switches' | 'Nodes'): string[] => {
      const names = expandNames(values.get(key) ?? '', place, TOPOLOGY_NAMES_MAX - nameCount);
      nameCount += names.length;
      return names;
    };
    switches.push({
      ...{ name, line, switches: namesOf('Switches'), linkSpeed: speedOf(values.get('LinkSpeed'), place) },
      hosts: namesOf('Nodes').map((host) => ({ name: host, linkSpeed: null })),
    });
  }
  return { switches, linkSpeedUnit: 'arbitrary', root: null };
}

/** Yields the lines without comments and line ends, and joins those that go on. `line` is the first of them. */
function* logicalLines(text: string): Iterable<{ line: number; text: string }> {
  let first = 0;
  let parts: string[] = [];
  for (const [index, whole] of text.split('\n').entries()) {
    if (parts.length === 0) first = index + 1;
    const line = withoutComment(whole);
    const trimmed = line.trimEnd();
    if (trailingBackslashes(trimmed) % 2 === 1) {
      parts.push(trimmed.slice(0, -1));
      continue;
    }
    yield { line: first, text: [...parts, line].join('') };
    parts = [];
  }
  // The file ends with a backslash.
  if (parts.length > 0) yield { line: first, text: parts.join('') };
}

function withoutComment(line: string): string {
  let isEscaped = false;
  for (let at = 0; at < line.length; at++) {
    if (line[at] === '#' && !isEscaped) return line.slice(0, at);
    isEscaped = line[at] === '\\' && !isEscaped;
  }
  return line;
}

function trailingBackslashes(line: string): number {
  let count = 0;
  while (count < line.length && line[line.length - 1 - count] === '\\') count++;
  return count;
}

/** Sticky: each match begins where the last one has ended. No part of it can match the same characters in two ways. */
const PAIR = /\s*([\w.]+)\s*=\s*(?:"([^"]*)"|([^\s"]\S*))(?=\s|$)/y;

/** Returns null for an empty line. */
function valuesOf(content: string, place: Place): Map<Key, string> | null {
  const line = content.replace(/\\(.)/g, '$1').trim();
  if (line === '') return null;
  const values = new Map<Key, string>();
  PAIR.lastIndex = 0;
  while (PAIR.lastIndex < line.length) {
    const start = PAIR.lastIndex;
    const match = PAIR.exec(line);
    if (match === null) throw topologyMistake(place, shown(line.slice(start).trim()), LINE_EXPECTED);
    const key = KEYS.find((known) => known.toLowerCase() === (match[1] ?? '').toLowerCase());
    if (key === undefined || (values.size === 0 && key !== 'SwitchName')) {
      throw topologyMistake(place, `the key ${shown(match[1] ?? '')}`, LINE_EXPECTED);
    }
    if (values.has(key)) throw topologyMistake(place, `${key} twice`, `each key once: ${LINE_EXPECTED}`);
    values.set(key, match[2] ?? match[3] ?? '');
  }
  return values;
}

const SPEED_MAX = 2 ** 32 - 1;

/** A number of 32 bits, with K or M behind it or not, as Slurm reads it. */
function speedOf(text: string | undefined, place: Place): number | null {
  if (text === undefined || /^(unlimited|infinite)$/i.test(text)) return null;
  const match = /^(\d{1,10})([km]?)$/i.exec(text);
  const factor = { k: 1024, m: 1024 * 1024 }[(match?.[2] ?? '').toLowerCase()] ?? 1;
  const speed = Number(match?.[1]) * factor;
  if (match === null || speed > SPEED_MAX) {
    throw topologyMistake(place, `LinkSpeed=${shown(text)}`, 'a whole number of 32 bits, such as LinkSpeed=100');
  }
  return speed === 0 ? null : speed;
}

/** Reads QEMU's command line: pairs of option and value, and values of the form `a,key=value,…` or JSON. Pure. */

export interface Argument {
  /** Without its dashes; empty for a value that follows no option. */
  readonly option: string;
  /** Empty if the option has none. */
  readonly value: string;
  /** As a person wrote it. */
  readonly text: string;
}

/** Splits arguments. One that begins with a dash is an option; the next one is its value unless it is another. */
export function argumentsIn(args: readonly string[]): Argument[] {
  const found: Argument[] = [];
  for (let index = 0; index < args.length; index++) {
    const argument = args[index] ?? '';
    if (!isOption(argument)) {
      found.push({ option: '', value: argument, text: argument });
      continue;
    }
    const next = args[index + 1];
    const hasValue = next !== undefined && !isOption(next);
    if (hasValue) index++;
    const value = hasValue ? next : '';
    found.push({ option: argument.replace(/^--?/, ''), value, text: hasValue ? `${argument} ${value}` : argument });
  }
  return found;
}

function isOption(argument: string): boolean {
  return argument.length > 1 && argument.startsWith('-');
}

export interface Options {
  /** The value before the first key, if it has no key itself: the driver of `-device`, the kind of `-netdev`. */
  readonly head: string;
  /** The last value of each key. Keys of nested JSON are joined with a dot, as in QEMU's own notation. */
  readonly keys: ReadonlyMap<string, string>;
  /** All pairs in order, because some options have a key several times. */
  readonly pairs: readonly (readonly [key: string, value: string])[];
}

/** A comma within a value is written twice. A key without a value means "on", or with a "no" before it "off". */
export function optionsIn(value: string): Options {
  const pairs = value.trimStart().startsWith('{') ? pairsOfJson(value) : null;
  if (pairs !== null) return { head: '', keys: new Map(pairs), pairs };
  const parts = splitAtCommas(value);
  const first = parts[0] ?? '';
  const head = first.includes('=') ? '' : first;
  const written = parts.slice(head === '' && first !== '' ? 0 : 1).map((part) => pairOf(part));
  return { head, keys: new Map(written), pairs: written };
}

function splitAtCommas(value: string): string[] {
  const parts: string[] = [];
  let part = '';
  for (let index = 0; index < value.length; index++) {
    if (value[index] !== ',') part += value[index];
    else if (value[index + 1] === ',') {
      part += ',';
      index++;
    } else {
      parts.push(part);
      part = '';
    }
  }
  return [...parts, part];
}

function pairOf(part: string): readonly [string, string] {
  const at = part.indexOf('=');
  if (at >= 0) return [part.slice(0, at), part.slice(at + 1)];
  return /^no[a-z]/.test(part) ? [part.slice(2), 'off'] : [part, 'on'];
}

/** Returns null if the text is not a JSON object. QEMU refuses such an argument itself. */
function pairsOfJson(text: string): [string, string][] | null {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    return null;
  }
  const pairs: [string, string][] = [];
  const walk = (value: unknown, path: string): void => {
    if (typeof value === 'object' && value !== null) {
      for (const [key, member] of Object.entries(value)) walk(member, path === '' ? key : `${path}.${key}`);
    } else if (typeof value === 'boolean') pairs.push([path, value ? 'on' : 'off']);
    else pairs.push([path, String(value)]);
  };
  walk(json, '');
  return pairs;
}

/** True for the values that QEMU takes as "on". */
export function isOn(value: string | undefined): boolean {
  return value === 'on' || value === 'yes' || value === 'true' || value === 'y';
}

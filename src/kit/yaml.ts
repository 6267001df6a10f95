/** Reads YAML (and so JSON) of users in a time that grows with its length only. */
import type { CST, Document, LineCounter, ParsedNode, YAMLError } from 'yaml';

const ALIASES_MAX = 16;
/** The package's composer calls itself for each level. Without this limit a text of `[` can end the whole process. */
const LEVELS_MAX = 100;
/** Names, signs, blanks, line ends. The package takes some 10 us for each. */
const PARTS_MAX = 131_072;
/** Those whose number the package takes more time for than it should. */
const RARE: ReadonlySet<string> = new Set(['tag', 'anchor', 'directive-line']);
const RARE_MAX = 1000;

/**
 * Returns the content. Throws a YamlMistake. The package's own check for keys that come twice compares each key with
 * all others, which takes many seconds for a text of some hundred kilobytes.
 */
export async function parseYaml(text: string): Promise<unknown> {
  return (await parseYamlWithLines(text)).value;
}

/** A mistake in a text, with its line, which counts from 1, if it is known. */
export class YamlMistake extends Error {
  readonly line: number | null;

  constructor(message: string, line: number | null, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = 'YamlMistake';
    this.line = line;
  }
}

export interface YamlWithLines {
  readonly value: unknown;
  /** The line in which the value at a path of keys and indices begins, or the last part of the path that exists. */
  readonly lineOf: (path: readonly (string | number)[]) => number;
}

/** Like parseYaml. */
export async function parseYamlWithLines(text: string): Promise<YamlWithLines> {
  const { Composer, LineCounter } = await import('yaml');
  const lines = new LineCounter();
  const composer = new Composer<ParsedNode>({ uniqueKeys: false, logLevel: 'error' });
  const tokens = await tokensOf(text, lines);
  let document: Document | null = null;
  for (const next of composer.compose(tokens, true, text.length)) {
    if (document !== null) throw mistakeAt('there is more than one document', next.range[0], lines);
    document = next;
    const [mistake] = next.errors;
    if (mistake !== undefined) throw mistakeOf(mistake, lines);
  }
  if (document === null) throw new YamlMistake('there is no document', null);
  await checkKeys(document, lines);
  const whole = document;
  try {
    return { value: whole.toJS({ maxAliasCount: ALIASES_MAX }), lineOf: (path) => lineAt(whole, lines, path) };
  } catch (error) {
    throw new YamlMistake(error instanceof Error ? error.message : String(error), null, error);
  }
}

/** Returns a lazy list, so that a text is given up at its first token that is too much. */
async function tokensOf(text: string, lines: LineCounter): Promise<Iterable<CST.Token>> {
  const { CST: cst, Lexer, Parser } = await import('yaml');
  return (function* () {
    const parser = new Parser(lines.addNewLine);
    let partCount = 0;
    let rareCount = 0;
    lines.addNewLine(0);
    for (const source of new Lexer().lex(text)) {
      yield* parser.next(source);
      if (parser.stack.length > LEVELS_MAX) throw mistakeAt('it is nested too deeply', parser.offset, lines);
      if (++partCount > PARTS_MAX) throw mistakeAt('it has too many parts', parser.offset, lines);
      if (!RARE.has(cst.tokenType(source) ?? '')) continue;
      if (++rareCount > RARE_MAX) throw mistakeAt('it has too many tags or anchors', parser.offset, lines);
    }
    yield* parser.end();
  })();
}

async function checkKeys(document: Document, lines: LineCounter): Promise<void> {
  const { isMap, isScalar, visit } = await import('yaml');
  visit(document, {
    Map(_, map) {
      if (!isMap(map)) return;
      const keys = new Set<unknown>();
      for (const { key } of map.items) {
        if (!isScalar(key)) continue;
        if (keys.has(key.value))
          throw mistakeAt(`the key ${String(key.value)} comes twice`, key.range?.[0] ?? 0, lines);
        keys.add(key.value);
      }
    },
  });
}

function mistakeAt(message: string, offset: number, lines: LineCounter, cause?: unknown): YamlMistake {
  const { line, col } = lines.linePos(offset);
  return line === 0
    ? new YamlMistake(message, null)
    : new YamlMistake(`${message} at line ${line}, column ${col}`, line, cause);
}

const mistakeOf = (error: YAMLError, lines: LineCounter): YamlMistake =>
  mistakeAt(error.message, error.pos[0], lines, error);

function lineAt(document: Document, lines: LineCounter, path: readonly (string | number)[]): number {
  for (let length = path.length; length > 0; length--) {
    const node = document.getIn(path.slice(0, length), true) as { readonly range?: readonly number[] } | undefined;
    if (node?.range !== undefined) return lines.linePos(node.range[0] ?? 0).line;
  }
  return 1;
}

/** Reads YAML (and so JSON) of users in a time that grows with its length only. */
import type { Document, LineCounter } from 'yaml';

const ALIASES_MAX = 16;

const TOO_DEEP = 'it is nested too deeply';

/**
 * Returns the content. Throws an Error with the place of the mistake. The package's own check for keys that come twice
 * compares each key with all others, which takes many seconds for a text of some hundred kilobytes.
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

/** Like parseYaml. Throws a YamlMistake. */
export async function parseYamlWithLines(text: string): Promise<YamlWithLines> {
  const { LineCounter } = await import('yaml');
  const lines = new LineCounter();
  try {
    const document = await parse(text, lines);
    return { value: document.toJS({ maxAliasCount: ALIASES_MAX }), lineOf: (path) => lineAt(document, lines, path) };
  } catch (error) {
    if (error instanceof YamlMistake) throw error;
    const message = error instanceof Error ? error.message : String(error);
    // The package's parser calls itself for each level.
    if (/call stack/i.test(message)) throw new YamlMistake(TOO_DEEP, null, error);
    const { linePos } = error as { linePos?: readonly { readonly line: number }[] };
    throw new YamlMistake(message, linePos?.[0]?.line ?? null, error);
  }
}

async function parse(text: string, lineCounter: LineCounter): Promise<Document> {
  const { isMap, isScalar, parseDocument, visit } = await import('yaml');
  const document = parseDocument(text, { uniqueKeys: false, logLevel: 'error', lineCounter });
  const [mistake] = document.errors;
  if (mistake !== undefined) throw mistake;
  visit(document, {
    Map(_, map) {
      if (!isMap(map)) return;
      const keys = new Set<unknown>();
      for (const { key } of map.items) {
        if (!isScalar(key)) continue;
        if (keys.has(key.value)) {
          const { line } = lineCounter.linePos(key.range?.[0] ?? 0);
          throw new YamlMistake(`the key ${String(key.value)} comes twice`, line);
        }
        keys.add(key.value);
      }
    },
  });
  return document;
}

function lineAt(document: Document, lines: LineCounter, path: readonly (string | number)[]): number {
  for (let length = path.length; length > 0; length--) {
    const node = document.getIn(path.slice(0, length), true) as { readonly range?: readonly number[] } | undefined;
    if (node?.range !== undefined) return lines.linePos(node.range[0] ?? 0).line;
  }
  return 1;
}

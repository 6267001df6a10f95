/** Reads YAML (and so JSON) of users in a time that grows with its length only. */

const ALIASES_MAX = 16;

const TOO_DEEP = 'it is nested too deeply';

/**
 * Returns the content. Throws an Error with the place of the mistake. The package's own check for keys that come twice
 * compares each key with all others, which takes many seconds for a text of some hundred kilobytes.
 */
export async function parseYaml(text: string): Promise<unknown> {
  try {
    return await parse(text);
  } catch (error) {
    // The package's parser calls itself for each level.
    if (error instanceof Error && /call stack/i.test(error.message)) throw new Error(TOO_DEEP, { cause: error });
    throw error;
  }
}

async function parse(text: string): Promise<unknown> {
  const { isMap, isScalar, parseDocument, visit } = await import('yaml');
  const document = parseDocument(text, { uniqueKeys: false, logLevel: 'error' });
  const [mistake] = document.errors;
  if (mistake !== undefined) throw mistake;
  visit(document, {
    Map(_, map) {
      if (!isMap(map)) return;
      const keys = new Set<unknown>();
      for (const { key } of map.items) {
        if (!isScalar(key)) continue;
        if (keys.has(key.value)) throw new Error(`the key ${String(key.value)} comes twice`);
        keys.add(key.value);
      }
    },
  });
  return document.toJS({ maxAliasCount: ALIASES_MAX });
}

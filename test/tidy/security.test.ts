import { existsSync, readFileSync } from 'node:fs';
import { expect, test } from 'vitest';

/** `test/FILE`: "title", "title"; `test/FILE`: "title" */
const CLAIM = /`(test\/[^`]+)`: ((?:"[^"]+"(?:, )?)+)/g;

test('every promise of docs/SECURITY.md has a test, and the tests that it names exist', () => {
  const text = readFileSync('docs/SECURITY.md', 'utf8');
  const rows = text
    .slice(text.indexOf('## What holds'), text.indexOf('## What does not'))
    .match(/^\| (?!---|promise).*$/gm);
  expect(rows?.length).toBeGreaterThan(10);
  const missing = (rows ?? []).flatMap((row) => {
    const claims = [...row.matchAll(CLAIM)];
    if (claims.length === 0) return [row];
    return claims.flatMap(([, file = '', titles = '']) => {
      const code = existsSync(file) ? readFileSync(file, 'utf8') : '';
      return [...titles.matchAll(/"([^"]+)"/g)].map(([, title = '']) => title).filter((title) => !code.includes(title));
    });
  });
  expect(missing).toEqual([]);
});

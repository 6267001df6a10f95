import { expect, test } from 'vitest';
import { parseYaml } from '../../../src/kit/yaml.js';

test('a text is read, in YAML and JSON', async () => {
  expect(await parseYaml('a: { b: [1, two] }\nc: true')).toEqual({ a: { b: [1, 'two'] }, c: true });
  expect(await parseYaml('{"a": 1}')).toEqual({ a: 1 });
});

test('a key that comes twice is refused, at any depth', async () => {
  for (const text of ['a: 1\na: 2', '{"a": 1, "a": 2}', 'x:\n  - b: 1\n    c: 2\n    b: 3'])
    await expect(parseYaml(text)).rejects.toThrow(/the key [ab] comes twice/);
});

test('a text that is wrong, or grows by its aliases, is refused', async () => {
  await expect(parseYaml('a: [1')).rejects.toThrow();
  const bomb = Array.from({ length: 20 }, (_, index) => `a${index + 1}: &a${index + 1} [*a${index}, *a${index}]`);
  await expect(parseYaml(['a0: &a0 x', ...bomb].join('\n'))).rejects.toThrow(/alias/i);
});

test('a text that is nested too deeply is refused in plain words', async () => {
  for (const text of ['['.repeat(16_000), '{a: '.repeat(8_000), '- '.repeat(16_000)])
    await expect(parseYaml(text)).rejects.toThrow(/^it is nested too deeply$/);
});

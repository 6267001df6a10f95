import { expect, test } from 'vitest';
import { parseYaml, parseYamlWithLines, YamlMistake } from '../../../src/kit/yaml.js';

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
  for (const text of ['['.repeat(500_000), '{a: '.repeat(8_000), '- '.repeat(16_000), '? '.repeat(500_000)])
    await expect(parseYaml(text)).rejects.toThrow(/^it is nested too deeply at line 1, column \d+$/);
  const deep = 30;
  expect(JSON.stringify(await parseYaml(`${'['.repeat(deep)}${']'.repeat(deep)}`))).toHaveLength(2 * deep);
});

test('a text of which the package would take minutes is refused before', async () => {
  for (const text of ['!x '.repeat(300_000), '&a '.repeat(300_000), '%x\n'.repeat(300_000)])
    await expect(parseYaml(text)).rejects.toThrow(/^it has too many tags or anchors at line/);
  for (const text of ['\n'.repeat(1_000_000), `[${'a,'.repeat(400_000)}]`])
    await expect(parseYaml(text)).rejects.toThrow(/^it has too many parts at line/);
});

test('a mistake is named with its place, and so is each value', async () => {
  const mistake: unknown = await parseYaml('a: 1\nb: [2\nc: 3\n').catch((error: unknown) => error);
  expect(mistake).toBeInstanceOf(YamlMistake);
  expect(mistake).toMatchObject({ line: 3, message: expect.stringMatching(/ at line 3, column 1$/) });
  const { value, lineOf } = await parseYamlWithLines('a:\n  - b\n  - c: { d: 1 }\n');
  expect(value).toEqual({ a: ['b', { c: { d: 1 } }] });
  expect([lineOf(['a', 0]), lineOf(['a', 1, 'c', 'd']), lineOf(['a', 1, 'x']), lineOf(['x'])]).toEqual([2, 3, 3, 1]);
});

test('a text of two documents, or of none, is refused or empty', async () => {
  await expect(parseYaml('a: 1\n---\nb: 2')).rejects.toThrow(/more than one document at line 2/);
  expect(await parseYaml('')).toBeNull();
});

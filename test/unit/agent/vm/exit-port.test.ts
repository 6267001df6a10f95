import { appendFile, mkdtemp, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { ExitWatch, parseExitCode, readExitCode } from '../../../../src/agent/vm/exit-port.js';

let directory: string;
let path: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-exit-'));
  path = join(directory, 'exit');
});
afterEach(() => rm(directory, { recursive: true }));

test.each([
  ['0\n', 0],
  ['255\n', 255],
  ['3\n7\n', 7],
  ['7\r\n', 7],
  ['7\nnoise\n', 7],
  ['', null],
  ['7', null],
  ['256\n', null],
  ['3\n999\n', null],
  ['-1\n', null],
  ['0x7\n', null],
  ['1e1\n', null],
])('%j means %s', (text, code) => {
  expect(parseExitCode(text)).toBe(code);
});

test('whatever a guest writes, the code is a byte or nothing', () => {
  fc.assert(
    fc.property(fc.string({ unit: 'binary' }), (text) => {
      const code = parseExitCode(text);
      expect(code === null || (Number.isInteger(code) && code >= 0 && code <= 255)).toBe(true);
    }),
  );
});

test('a file of any size is read at its end, and none is no code', async () => {
  expect(await readExitCode(path)).toBeNull();
  await writeFile(path, '1\n');
  await truncate(path, 2 ** 40);
  await appendFile(path, '\n42\n');
  expect(await readExitCode(path)).toBe(42);
});

test('codes are told as they are written, and what was there before', async () => {
  await writeFile(path, '5\n');
  const codes: number[] = [];
  const watch = new ExitWatch(path, (code) => codes.push(code));
  await expect.poll(() => codes).toEqual([5]);
  await appendFile(path, '6');
  await appendFile(path, '\n');
  await expect.poll(() => codes).toEqual([5, 6]);
  watch.close();
  watch.close();
  new ExitWatch(join(directory, 'none'), () => undefined).close();
});

import { appendFile, mkdtemp, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { afterEach, beforeEach, expect, test } from 'vitest';
import {
  ExitWatch,
  ProcessExitSource,
  parseExitCode,
  readExitCode,
  watchExitPort,
} from '../../../../src/agent/vm/exit-port.js';

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

test('the rest of a line that has lost its beginning is no code', async () => {
  await writeFile(path, `${'9'.repeat(5000)}\n`);
  await appendFile(path, 'noise\n');
  expect(await readExitCode(path)).toBeNull();
  const port = new Port();
  port.write(`${'9'.repeat(4094)}\n`);
  expect(parseExitCode((await new ProcessExitSource(port).read()).text)).toBeNull();
  port.write('x'.repeat(4000));
  const source = new ProcessExitSource(port);
  await source.read();
  port.write(`${'y'.repeat(93)}123\n`);
  expect(parseExitCode((await source.read()).text)).toBeNull();
});

/** QEMU's ring buffer: it keeps the last 4 KiB until they are taken. */
class Port {
  #text = '';
  isOpen = false;
  readCount = 0;

  write(text: string): void {
    this.#text = (this.#text + text).slice(-4096);
  }

  takeExitText(): Promise<{ text: string; isOpen: boolean }> {
    this.readCount++;
    const text = this.#text;
    this.#text = '';
    return Promise.resolve({ text, isOpen: this.isOpen });
  }
}

test('a code of which the halves are taken apart is put together', async () => {
  const port = new Port();
  const source = new ProcessExitSource(port);
  port.write('3\n4');
  expect(parseExitCode((await source.read()).text)).toBe(3);
  port.write('2\n');
  expect(parseExitCode((await source.read()).text)).toBe(42);
});

test('a guest that never stops writing costs some reads a second, and its last code counts', async () => {
  const port = new Port();
  const codes: number[] = [];
  const watch = watchExitPort(port, join(directory, 'none'), (code) => codes.push(code));
  port.isOpen = true;
  const beganAtMs = performance.now();
  let lookCount = 0;
  while (performance.now() - beganAtMs < 600) {
    port.write('1\n'.repeat(3000));
    watch.look();
    lookCount++;
    await new Promise((resolve) => setImmediate(resolve));
  }
  const readsMax = 1 + (performance.now() - beganAtMs) / 50;
  expect(lookCount).toBeGreaterThan(readsMax);
  expect(port.readCount).toBeLessThanOrEqual(readsMax);
  port.write('7\n');
  await watch.drain();
  expect(codes).toEqual([1, 7]);
  port.write('8\n');
  watch.close();
  await watch.drain();
  expect(codes).toEqual([1, 7]);
});

test('an open port is read again without being told', async () => {
  const port = new Port();
  port.isOpen = true;
  const codes: number[] = [];
  const watch = new ExitWatch(new ProcessExitSource(port), (code) => codes.push(code));
  await expect.poll(() => port.readCount).toBeGreaterThan(0);
  port.write('9\n');
  await expect.poll(() => codes).toEqual([9]);
  watch.close();
});

test('VMs of an earlier build: codes are told as they are written, and what was there before', async () => {
  await writeFile(path, '5\n');
  const codes: number[] = [];
  const watch = watchExitPort(new Port(), path, (code) => codes.push(code));
  await expect.poll(() => codes).toEqual([5]);
  await appendFile(path, '6');
  await appendFile(path, '\n');
  await expect.poll(() => codes).toEqual([5, 6]);
  watch.close();
  watch.close();
});

import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { commitOverlay, createOverlay } from '../../../../src/backends/qemu/img.js';

const LENGTH_BYTES = 1 << 20;
let directory: string;
const at = (name: string): string => join(directory, name);
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'vmg-merge-'));
  for (const name of ['base', 'secret']) writeFileSync(at(name), Buffer.alloc(LENGTH_BYTES, name[0]));
});
afterEach(() => rmSync(directory, { recursive: true }));

async function overlay(): Promise<string> {
  await createOverlay(at('top'), { path: at('base'), format: 'raw' }, LENGTH_BYTES);
  execFileSync('qemu-io', ['-f', 'qcow2', '-c', 'write -P 0x58 0 64k', at('top')]);
  return at('top');
}

test('an overlay is merged into the file that it lies on', async () => {
  await commitOverlay(await overlay(), at('base'));
  expect(
    readFileSync(at('base'))
      .subarray(0, 65_536)
      .every((byte) => byte === 0x58),
  ).toBe(true);
});

test.each([
  ['another base', ['rebase', '-u', '-f', 'qcow2', '-F', 'raw', '-b', 'secret']],
  ['no base', ['rebase', '-u', '-f', 'qcow2', '-b', '']],
])('an overlay that its guest has given %s is not, and nothing is written', async (_, [command = '', ...options]) => {
  const top = await overlay();
  execFileSync('qemu-img', [command, ...options.map((word) => (word === 'secret' ? at(word) : word)), top]);
  await expect(commitOverlay(top, at('base'))).rejects.toMatchObject({ code: 'CORRUPT' });
  for (const name of ['base', 'secret'])
    expect(readFileSync(at(name)).equals(Buffer.alloc(LENGTH_BYTES, name[0])), name).toBe(true);
});

test('an overlay whose content its guest has put into another file is not merged', async () => {
  const options = `data_file=${at('secret')},backing_file=${at('base')},backing_fmt=raw`;
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, at('top'), String(LENGTH_BYTES)]);
  await expect(commitOverlay(at('top'), at('base'))).rejects.toMatchObject({ code: 'CORRUPT' });
});

/** Files of a spec, real ones and the real qemu-img. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { refuseUnusableFiles } from '../../../../src/agent/inventory/spec-files.js';
import { QemuBackend } from '../../../../src/backends/qemu/backend.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

let directory: string;
const at = (name: string) => join(directory, name);
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'vmg-spec-'));
  for (const name of ['vmlinuz', 'base.raw', 'disk.raw']) writeFileSync(at(name), 'content');
  const backing = ['-b', at('base.raw'), '-F', 'raw'];
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, at('disk.qcow2')]);
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

function look(): Promise<void> {
  const disks = [{ path: at('disk.qcow2') }, { path: at('disk.raw'), format: 'raw' }];
  const spec = parseSpec({ name: 'web', memory: { size: '16M' }, kernel: at('vmlinuz'), disks });
  return refuseUnusableFiles(new QemuBackend().diskFiles, spec);
}

test('that are there are no reason', () => look());

test('that are missing or no files are all named, with their keys', async () => {
  for (const name of ['vmlinuz', 'base.raw', 'disk.raw']) rmSync(at(name));
  execFileSync('mkfifo', [at('vmlinuz')]);
  const disks = 'disk disk0: .*base\\.raw.*; disk disk1: there is no .*disk\\.raw$';
  await expect(look()).rejects.toMatchObject({
    code: 'SPEC_INVALID',
    message: expect.stringMatching(
      new RegExp(`^web cannot start: kernel: .*vmlinuz is neither.*; ${disks}`, 's'),
    ) as string,
  });
});

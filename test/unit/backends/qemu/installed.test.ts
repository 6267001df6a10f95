import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { askQemu } from '../../../../src/backends/qemu/installed.js';

const VERSION = 'echo "QEMU emulator version 7.2.22 (Debian 1:7.2)"';
const MACHINES =
  'printf "%s\\n" "Supported machines are:" "q35 Standard PC (alias of pc-q35-7.2)" "pc-q35-7.2 Standard PC"';

let directory: string;
beforeAll(async () => void (directory = await mkdtemp(join(tmpdir(), 'vmg-installed-'))));
afterAll(() => rm(directory, { recursive: true, force: true }));

/** A program that runs one command for `--version`, and the other one for `-machine help`. */
async function program(name: string, version: string, machines: string): Promise<string> {
  const path = join(directory, name);
  const text = `#!/bin/sh\ncase "$1" in --version) ${version} ;; *) ${machines} ;; esac\n`;
  await writeFile(path, text, { mode: 0o755 });
  return path;
}

test('version, machine types and their aliases are what the program says', async () => {
  const path = await program('whole', VERSION, MACHINES);
  const machines = { machines: ['q35', 'pc-q35-7.2'], aliases: { q35: 'pc-q35-7.2' } };
  expect(await askQemu(path)).toEqual({ program: path, version: '7.2.22', ...machines });
});

test.each([
  ['no version', ':', MACHINES, 'version'],
  ['no machine types', VERSION, ':', 'machine types'],
  ['an error', 'exit 1', MACHINES, 'Command failed'],
])('a program that says %s does not work, even if it ends in peace', async (name, version, machines, message) => {
  const asked = askQemu(await program(name.replace(' ', '-'), version, machines));
  await expect(asked).rejects.toMatchObject({
    code: 'UNSUPPORTED',
    message: expect.stringContaining(message) as string,
  });
});

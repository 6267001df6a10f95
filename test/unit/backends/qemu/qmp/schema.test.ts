import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { parseMachines } from '../../../../../src/backends/qemu/installed.js';
import { QmpClient } from '../../../../../src/backends/qemu/qmp/client.js';
import {
  commandTypes,
  QMP_COMMANDS_USED,
  type SchemaEntry,
} from '../../../../../src/backends/qemu/qmp/generate-schema.js';

let directory: string;
let qemu: ChildProcess;
let client: QmpClient;
beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-schema-'));
  const path = join(directory, 'qmp.sock');
  const qmp = `unix:${path},server=on,wait=off`;
  qemu = spawn('qemu-system-x86_64', ['-M', 'none', '-nodefaults', '-display', 'none', '-qmp', qmp], {
    stdio: 'ignore',
  });
  client = await QmpClient.connect(path, { timeoutMs: 10_000, isRetrying: true });
});
afterAll(async () => {
  client.close();
  qemu.kill('SIGKILL');
  await rm(directory, { recursive: true, force: true });
});

test('the installed QEMU has every command we use, and commands.ts is what it says of them', async () => {
  const schema = (await client.execute('query-qmp-schema')) as unknown as SchemaEntry[];
  const names = new Set(schema.filter((entry) => entry['meta-type'] === 'command').map((entry) => entry.name));
  expect(QMP_COMMANDS_USED.filter((name) => !names.has(name))).toEqual([]);
  const generated = commandTypes(schema);
  // Types are generated from 7.2. Another QEMU has more members, which is not an error of the file.
  if (!client.version.startsWith('7.2.')) return;
  const formatting = promisify(execFile)('node_modules/.bin/biome', [
    'format',
    '--stdin-file-path=src/backends/qemu/qmp/schema.ts',
  ]);
  formatting.child.stdin?.end(generated);
  expect((await formatting).stdout).toBe(await readFile('src/backends/qemu/qmp/schema.ts', 'utf8'));
});

test('the list of machines by command line is the one by QMP', async () => {
  const { stdout } = await promisify(execFile)('qemu-system-x86_64', ['-machine', 'help']);
  const { machines, aliases } = parseMachines(stdout);
  const live = await client.execute('query-machines');
  expect(live.map((machine) => machine.name).filter((name) => !machines.includes(name))).toEqual([]);
  for (const machine of live) {
    if (machine.alias !== undefined) expect(aliases[machine.alias]).toBe(machine.name);
  }
  expect(aliases['q35']).toMatch(/^pc-q35-\d+\.\d+$/);
});

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { VmCgroups } from '../../../../src/agent/contain/cgroups.js';

const host = `T${process.pid}`;
const cgroups = await VmCgroups.open(host, '/state');

afterAll(() => cgroups.close());

test('a VM has cgroups of its own, with a limit of threads, until its processes have ended', async () => {
  const directories = await cgroups.make('vm');
  expect(directories.length > 0, 'a host without cgroups has none').toBe(cgroups.isUsable);
  expect(await cgroups.make('vm')).toEqual(directories);
  for (const directory of directories) expect(directory).toMatch(/\/vmigrate-T\d+-[0-9a-f]{8}\/vm-vm$/);
  // Version 2 counts processes only if the cgroups above let it.
  const counting = directories.filter((directory) => existsSync(join(directory, 'pids.max')));
  for (const directory of counting) expect(await readFile(join(directory, 'pids.max'), 'utf8')).toBe('4096\n');
  const child = spawn('sleep', ['30']);
  for (const directory of directories) await writeFile(join(directory, 'cgroup.procs'), String(child.pid));
  await cgroups.remove('vm');
  for (const directory of directories) expect(existsSync(directory), 'a process is in it').toBe(true);
  child.kill('SIGKILL');
  await once(child, 'exit');
  await cgroups.remove('vm');
  await cgroups.remove('vm');
  for (const directory of directories) expect(existsSync(directory)).toBe(false);
});

test('daemons of one name have cgroups of their own', async () => {
  const others = await VmCgroups.open(host, '/other-state');
  try {
    const [own, other] = [await cgroups.make('vm'), await others.make('vm')];
    expect(own.filter((directory) => other.includes(directory))).toEqual([]);
    await cgroups.remove('vm');
    for (const directory of other) expect(existsSync(directory)).toBe(true);
    await others.remove('vm');
  } finally {
    await others.close();
  }
});

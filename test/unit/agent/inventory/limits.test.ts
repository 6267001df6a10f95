/** The limits as files of /proc and of cgroups name them. */
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { hostLimits } from '../../../../src/agent/inventory/limits.js';

let root: string;

beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), 'vmg-limits-'));
  await write('proc/self/limits', 'Max open files            1024                 4096                 files\n');
  for (const fd of [0, 1, 2, 3, 4, 5]) await write(`proc/self/fd/${fd}`, '');
  await write('proc/sys/fs/file-nr', '3000\t0\t9000\n');
  await write('proc/loadavg', '0.00 0.01 0.05 2/700 12345\n');
  await write('proc/sys/kernel/threads-max', '10000\n');
  await write('proc/sys/kernel/pid_max', '4194304\n');
  await write('proc/self/cgroup', '0::/system.slice/vmigrated.service\n');
  await write('proc/self/status', 'Name:\tnode\nUid:\t0\t0\t0\t0\nCapEff:\t0000000000000000\n');
  await write('proc/self/maps', 'a\nb\nc\n');
  await write('proc/sys/vm/max_map_count', '65530\n');
  await write('proc/sys/fs/inotify/max_user_watches', '8192\n');
});
afterEach(() => rm(root, { recursive: true, force: true }));

async function write(path: string, text: string): Promise<void> {
  await mkdir(dirname(join(root, path)), { recursive: true });
  await writeFile(join(root, path), text);
}

const limits = () => hostLimits({ proc: join(root, 'proc'), cgroups: join(root, 'cgroup') });

describe('the limits of a host', () => {
  test('are read, each with what is used of it', async () => {
    expect(await limits()).toEqual({
      openFiles: { used: 5, max: 1024 },
      openFilesOfHost: { used: 3000, max: 9000 },
      tasks: { used: 700, max: 10_000 },
      mappings: { used: 3, max: 65_530 },
      fileWatchesMax: 8192,
    });
  });

  test('of tasks are those of the narrowest cgroup above the daemon', async () => {
    await write('cgroup/system.slice/vmigrated.service/pids.max', 'max\n');
    await write('cgroup/system.slice/vmigrated.service/pids.current', '12\n');
    await write('cgroup/system.slice/pids.max', '500\n');
    await write('cgroup/system.slice/pids.current', '480\n');
    expect((await limits()).tasks).toEqual({ used: 480, max: 500 });
  });

  test('of tasks hold for a user, but not for root', async () => {
    await write('proc/self/limits', 'Max processes             100                  100                  processes\n');
    expect((await limits()).tasks).toEqual({ used: 700, max: 10_000 });
    const status = 'Name:\tnode\nUid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\nThreads:\t7\n';
    await write('proc/self/status', status);
    await write('proc/41/status', status);
    await write('proc/42/status', status.replaceAll('1000', '1001'));
    expect((await limits()).tasks).toEqual({ used: 7, max: 100 });
  });

  test('that a kernel does not tell are left out', async () => {
    await rm(join(root, 'proc'), { recursive: true });
    expect(await limits()).toEqual({
      ...{ openFiles: null, openFilesOfHost: null, tasks: null, mappings: null, fileWatchesMax: null },
    });
  });

  test('of this machine are numbers', async () => {
    const { openFiles, tasks } = await hostLimits();
    expect(openFiles?.used).toBeGreaterThan(2);
    expect(openFiles?.max).toBeGreaterThan(openFiles?.used ?? 0);
    expect(tasks?.used).toBeGreaterThan(0);
  });
});

import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { cgroupFreeBytes, lockableBytes } from '../../../../src/transports/rdma/memory-limits.js';

const MIB = 2 ** 20;
let directory: string;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-limits-'));
});
afterEach(async () => {
  await rm(directory, { recursive: true, force: true });
});

async function put(files: Record<string, string>): Promise<void> {
  for (const [name, text] of Object.entries(files)) {
    await mkdir(dirname(join(directory, name)), { recursive: true });
    await writeFile(join(directory, name), text);
  }
}

describe('what may be locked', () => {
  const status = (capabilities: string, pinnedKib: number) =>
    `Name:\tnode\nVmPin:\t  ${pinnedKib} kB\nCapEff:\t${capabilities}\n`;
  const limits = (soft: string) =>
    `Limit  Soft Limit  Hard Limit  Units\nMax locked memory  ${soft}  unlimited  bytes\n`;

  test.each<[string, string, string, number | null]>([
    ['is what the limit leaves', status('0000000000000000', 1024), limits(String(8 * MIB)), 7 * MIB],
    ['is nothing where more is pinned than the limit allows', status('0', 9216), limits(String(8 * MIB)), 0],
    ['is everything without a limit', status('0', 0), limits('unlimited'), null],
    ['is everything with CAP_IPC_LOCK', status('0000000000004000', 0), limits('0'), null],
  ])('%s', async (_, statusText, limitsText, expected) => {
    await put({ status: statusText, limits: limitsText });
    expect(await lockableBytes(directory)).toBe(expected);
  });

  test('can be read here', async () => {
    const bytes = await lockableBytes();
    expect(bytes === null || bytes >= 0).toBe(true);
  });
});

describe('the room in the memory cgroup', () => {
  const read = () => cgroupFreeBytes(directory, join(directory, 'fs'));

  test('is that of the narrowest one above, and page cache counts as free', async () => {
    await put({
      cgroup: '0::/outer/inner\n',
      'fs/outer/memory.max': `${100 * MIB}\n`,
      'fs/outer/memory.current': `${90 * MIB}\n`,
      'fs/outer/memory.stat': `anon 1\ninactive_file ${20 * MIB}\nactive_file ${5 * MIB}\nshmem 7\n`,
      'fs/outer/inner/memory.max': `${80 * MIB}\n`,
      'fs/outer/inner/memory.current': `${10 * MIB}\n`,
    });
    expect(await read()).toBe(35 * MIB);
  });

  test('has no limit where none is set, or none can be seen', async () => {
    await put({ cgroup: '0::/a\n', 'fs/a/memory.max': 'max\n', 'fs/a/memory.current': '1\n' });
    expect(await read()).toBeNull();
    await put({ cgroup: '0::/elsewhere\n' });
    expect(await read()).toBeNull();
    await put({ cgroup: '1:name=systemd:/\n' });
    expect(await read()).toBeNull();
  });

  test('is known in version 1, too', async () => {
    await put({
      cgroup: '9:cpu,cpuacct:/x\n5:memory:/b\n0::/\n',
      'fs/memory/memory.limit_in_bytes': '9223372036854771712\n',
      'fs/memory/b/memory.limit_in_bytes': `${64 * MIB}\n`,
      'fs/memory/b/memory.usage_in_bytes': `${60 * MIB}\n`,
    });
    expect(await read()).toBe(4 * MIB);
  });
});

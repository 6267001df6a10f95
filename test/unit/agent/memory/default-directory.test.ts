/** The memory directory that nobody has named, with real mounts. */
import { execFileSync } from 'node:child_process';
import { mkdir, mkdtemp, open, readdir, readFile, rm, statfs, writeFile } from 'node:fs/promises';
import { tmpdir, totalmem } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { defaultMemoryDirectory } from '../../../../src/agent/memory/default-directory.js';
import { tieMemoryDirectory } from '../../../../src/agent/memory/mark.js';
import { resizeOwnTmpfs, type TmpfsSizes } from '../../../../src/agent/memory/own-tmpfs.js';
import { OWNERS_MIRROR } from '../../../../src/durable/state-format.js';

const MIB = 2 ** 20;
const BOOT = 'boot-1';
let base: string;
let stateDir: string;
let own: string;

beforeEach(async () => {
  base = await mkdtemp(join(tmpdir(), 'vmg-default-'));
  stateDir = join(base, 'state');
  own = join(base, 'run/A/ram');
  await mkdir(stateDir);
});
afterEach(async () => {
  const mounts = await readFile('/proc/self/mounts', 'utf8');
  for (const [, path = ''] of mounts.split('\n').map((line) => line.split(' ')))
    if (path.startsWith(`${base}/`)) execFileSync('umount', ['--lazy', path]);
  await rm(base, { recursive: true, force: true });
});

function choose(sizes: TmpfsSizes = {}) {
  const places = { host: 'A', stateDir, bootId: BOOT, root: join(base, 'run'), oldDefault: join(base, 'shm') };
  return defaultMemoryDirectory({ ...places, sizes });
}

/** What a start does: the directory is tied before it is resized. */
async function start(sizes: TmpfsSizes = {}): Promise<string | null> {
  const { path, problem } = await choose(sizes);
  await tie(path);
  return problem ?? resizeOwnTmpfs(path, sizes);
}

const tie = (ramDir: string) => tieMemoryDirectory({ stateDir, stateId: '1'.repeat(32), ramDir, bootId: BOOT });

async function sizeMiB(): Promise<number> {
  const { blocks, bsize } = await statfs(own);
  return Math.round((blocks * bsize) / MIB);
}

test('it is that of this boot, else that of 0.1.0 with memory of this daemon', async () => {
  await mkdir(join(stateDir, 'vms', 'v1'), { recursive: true });
  await mkdir(join(base, 'shm', 'v1'), { recursive: true });
  expect(await choose()).toEqual({ path: join(base, 'shm'), problem: null });
  await tie(join(base, 'shm'));
  await rm(join(stateDir, 'vms'), { recursive: true });
  expect(await choose()).toEqual({ path: join(base, 'shm'), problem: null });
});

test('it is a tmpfs of its own with room for what the daemon may promise, whatever the configuration was', async () => {
  const halfMiB = Math.round(totalmem() / MIB / 2);
  expect(await choose()).toEqual({ path: own, problem: null });
  expect(await sizeMiB()).toBe(halfMiB);
  // A budget, what clones may write, and the maps beside both.
  const small = { budgetBytes: 128 * MIB, cloneBudgetBytes: 64 * MIB };
  // A daemon that does not know yet whether the directory is its own leaves it as it is.
  await choose(small);
  expect(await sizeMiB()).toBe(halfMiB);
  expect(await start(small)).toBeNull();
  expect(await sizeMiB()).toBe(128 + 64 + 16);
  await start({ budgetBytes: 2 * totalmem(), cloneBudgetBytes: 0 });
  expect(await sizeMiB()).toBeGreaterThanOrEqual(4 * halfMiB);
  await start(small);
  await start();
  expect(await sizeMiB()).toBe(halfMiB);
  const mounts = (await readFile('/proc/self/mounts', 'utf8')).split('\n').filter((line) => line.includes(` ${own} `));
  expect(mounts).toHaveLength(1);
  expect(mounts[0]).toMatch(/ tmpfs rw,nosuid,nodev,noexec.*mode=700/);
});

test('it is never made smaller than the files in it can become, nor than a person has made it', async () => {
  await start({ budgetBytes: 512 * MIB, cloneBudgetBytes: 0 });
  await mkdir(join(own, 'v1'));
  const file = await open(join(own, 'v1', 'ram0.ram'), 'w');
  await file.truncate(300 * MIB);
  await file.close();
  expect(await start({ budgetBytes: 32 * MIB, cloneBudgetBytes: 0 })).toBeNull();
  expect(await sizeMiB()).toBe(300);
  const largeBytes = totalmem();
  execFileSync('mount', ['-o', `remount,size=${largeBytes}`, own]);
  await start();
  expect(await sizeMiB()).toBe(Math.round(largeBytes / MIB));
});

test('a mount of somebody else is left as it is', async () => {
  await mkdir(own, { recursive: true });
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=40m,mode=0700', 'theirs', own]);
  expect(await start({ budgetBytes: 128 * MIB })).toBeNull();
  expect(await sizeMiB()).toBe(40);
});

test('where none can be mounted, the directory is used as it is, and the reason is told at each start', async () => {
  const path = process.env.PATH;
  const refusing = join(base, 'bin');
  await mkdir(refusing);
  await writeFile(join(refusing, 'mount'), '#!/bin/sh\necho "mount: permission denied." >&2\nexit 32\n', {
    mode: 0o755,
  });
  process.env.PATH = `${refusing}:${path}`;
  try {
    const problem = `no tmpfs can be mounted on ${own}: mount: permission denied.`;
    expect(await choose()).toEqual({ path: own, problem });
    await tie(own);
    expect(await choose()).toEqual({ path: own, problem });
  } finally {
    process.env.PATH = path;
  }
  await mkdir(join(own, 'v1'));
  expect(await choose()).toMatchObject({ problem: expect.stringContaining('before memory came there') as string });
  // Nothing but the daemon's own files lies there any more, so the mount is tried again. The mark is made anew.
  await writeFile(join(own, OWNERS_MIRROR), '');
  await rm(join(own, 'v1'), { recursive: true });
  expect(await choose()).toEqual({ path: own, problem: null });
  expect(await readdir(own)).toEqual([]);
  await tie(own);
});

test('where the memory of this boot is hidden, nothing is mounted in its place, unless there is none', async () => {
  await start();
  execFileSync('umount', [own]);
  await mkdir(join(stateDir, 'vms', 'v1'), { recursive: true });
  // A VM whose record cannot be read counts as one that has memory.
  await writeFile(join(stateDir, 'vms', 'v1', 'record.json'), 'damaged');
  await expect(start()).rejects.toMatchObject({ code: 'CONFLICT' });
  expect(await readFile('/proc/self/mounts', 'utf8')).not.toContain(` ${own} `);
  await rm(join(stateDir, 'vms'), { recursive: true });
  expect(await start()).toBeNull();
  expect(await readFile('/proc/self/mounts', 'utf8')).toContain(` ${own} `);
});

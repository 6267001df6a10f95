/** Memory files are made only where this daemon alone may have made something. */
import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { chown, mkdir, mkdtemp, readdir, rename, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { tieHugePages } from '../../../../src/agent/memory/huge-pages.js';
import { createRegionFiles, regionFiles, removeRegionFiles } from '../../../../src/agent/vm/ram-files.js';
import { RamPlace } from '../../../../src/agent/vm/ram-place.js';
import type { VmSpec } from '../../../../src/domain/vm.js';

const NOBODY = 65_534;
const HUGE = 2 * 2 ** 20;
const OWNER = '1'.repeat(32);

let base: string;
let ramDir: string;
let place: RamPlace;
beforeEach(async () => {
  base = await mkdtemp(join(tmpdir(), 'vmg-place-'));
  ramDir = join(base, 'ram');
  place = new RamPlace({ host: 'A', ramDir });
});
afterEach(async () => {
  await place.close();
  await rm(base, { recursive: true, force: true });
});

function specOf(name: string, pageBytes = 4096): VmSpec {
  const regions = [{ id: 'ram0', lengthBytes: HUGE }];
  return { name, memory: { sizeBytes: HUGE, pageBytes, regions, backing: 'shared' } } as unknown as VmSpec;
}

async function strangers(path: string): Promise<void> {
  await mkdir(path);
  await chown(path, NOBODY, 0);
}

async function make(name: string, pageBytes?: number, where = place): Promise<void> {
  const spec = specOf(name, pageBytes);
  await createRegionFiles(where, spec, await regionFiles(where, spec, null), null);
}

describe('the directory on tmpfs', () => {
  test('that somebody has put in place of ours is refused, and ours is cleaned up all the same', async () => {
    await make('first');
    const moved = join(base, 'moved');
    await rename(ramDir, moved);
    await expect(make('second')).rejects.toMatchObject({ code: 'CONFLICT', remedy: expect.any(String) as string });
    await mkdir(ramDir, { mode: 0o700 });
    await expect(make('second')).rejects.toMatchObject({ code: 'CONFLICT' });
    expect(await readdir(ramDir)).toEqual([]);
    await removeRegionFiles(place, specOf('first'));
    expect(await readdir(moved)).toEqual([]);
    await rm(ramDir, { recursive: true });
    await rename(moved, ramDir);
    await make('second');
    expect((await stat(join(ramDir, 'second', 'ram0.ram'))).size).toBe(HUGE);
  });

  test('that a mount hides is refused', async () => {
    await make('first');
    execFileSync('mount', ['-t', 'tmpfs', 'none', ramDir]);
    try {
      await expect(make('second')).rejects.toMatchObject({ code: 'CONFLICT' });
      expect(await readdir(ramDir)).toEqual([]);
    } finally {
      execFileSync('umount', [ramDir]);
    }
  });

  test.each([
    ['a link', async (path: string, other: string) => symlink(other, path), 'SPEC_INVALID'],
    ['a folder of another user', (path: string) => strangers(path), /NOT_/],
    ['a file', async (path: string) => writeFile(path, ''), 'SPEC_INVALID'],
  ] as const)('has no folder for a VM where there is %s', async (_, put, code) => {
    await place.inRamDir(() => Promise.resolve());
    const other = join(base, 'other');
    await mkdir(other);
    await put(join(ramDir, 'vm'), other);
    await expect(make('vm')).rejects.toMatchObject({ code: expect.stringMatching(code) as string });
    expect(await readdir(other)).toEqual([]);
  });

  test('has no file where a link to one is', async () => {
    await place.make(4096, ['vm'], () => Promise.resolve());
    const victim = join(base, 'victim');
    await symlink(victim, join(ramDir, 'vm', 'ram0.ram'));
    await expect(make('vm')).rejects.toMatchObject({ code: 'CONFLICT' });
    await expect(stat(victim)).rejects.toMatchObject({ code: 'ENOENT' });
  });
});

describe('the directory on hugetlbfs', () => {
  let host: string;
  let root: string;
  let huge: RamPlace;
  let theirPlace: RamPlace;
  beforeEach(async () => {
    host = `t-${randomBytes(4).toString('hex')}`;
    await mkdir(join(base, 'huge'));
    execFileSync('mount', ['-t', 'hugetlbfs', '-o', `pagesize=${HUGE}`, 'none', join(base, 'huge')]);
    huge = new RamPlace({ host, ramDir, ownerId: OWNER });
    theirPlace = new RamPlace({ host, ramDir, ownerId: '2'.repeat(32) });
    root = await huge.path(HUGE);
  });
  afterEach(async () => {
    await huge.close();
    await theirPlace.close();
    await rm(root, { recursive: true, force: true });
    execFileSync('umount', [join(base, 'huge')]);
  });

  const log = { info: () => {}, warn: (...words: unknown[]) => void warnings.push(words), error: () => {} };
  let warnings: unknown[] = [];
  const tie = () => {
    warnings = [];
    return tieHugePages({ host, stateDir: join(base, 'state'), memoryId: OWNER }, log);
  };

  test('is made for its owner, marked, and cleaned up', async () => {
    await make('vm', HUGE, huge);
    expect(await readdir(root)).toEqual([`.owner-${OWNER}`, 'vm']);
    expect((await stat(root)).mode & 0o777).toBe(0o700);
    expect((await stat(join(root, 'vm', 'ram0.ram'))).size).toBe(HUGE);
    await tie();
    await removeRegionFiles(huge, specOf('vm', HUGE));
    expect(await readdir(root)).toEqual([`.owner-${OWNER}`]);
    expect(await readdir(ramDir)).toEqual([]);
    expect(warnings).toEqual([]);
  });

  test.each([
    ['of another user', () => strangers(root), 'NOT_PERMITTED'],
    ['with files of another user', async () => theirs(NOBODY), 'CONFLICT'],
    ['with memory that nobody has marked', async () => theirs(0), 'CONFLICT'],
    ['of another daemon', async () => make('vm', HUGE, theirPlace), 'CONFLICT'],
  ])('%s is refused, and nothing in it is touched', async (_, put, code) => {
    await put();
    const before = await readdir(root);
    const refused = { code: expect.stringMatching(code) as string, remedy: expect.any(String) as string };
    await expect(make('vm', HUGE, huge)).rejects.toMatchObject(refused);
    await removeRegionFiles(huge, specOf('vm', HUGE));
    await tie();
    expect(await readdir(root)).toEqual(before);
    expect(warnings).toHaveLength(1);
  });

  test('of an earlier build is taken over at the start if all that lies there is known', async () => {
    await theirs(0);
    await mkdir(join(base, 'state', 'vms', 'vm'), { recursive: true });
    await tie();
    expect(warnings).toEqual([]);
    await removeRegionFiles(huge, specOf('vm', HUGE));
    expect(await readdir(root)).toEqual([`.owner-${OWNER}`]);
  });

  /** Memory of a VM `vm`, without a mark. */
  async function theirs(uid: number): Promise<void> {
    await mkdir(join(root, 'vm'), { recursive: true });
    await chown(join(root, 'vm'), uid, 0);
  }
});

import { chmod, chown, mkdir, mkdtemp, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { openOwnDirectory } from '../../../src/kit/own-directory.js';

const NOBODY = 65_534;
const isRoot = process.geteuid?.() === 0;
let base: string;

beforeEach(async () => {
  base = await mkdtemp(join(tmpdir(), 'vmg-own-'));
});
afterEach(async () => {
  await rm(base, { recursive: true, force: true });
});

/** Opens the directory, closes it again, and returns its mode bits. */
async function modeOf(path: string, isContentChecked = true): Promise<number> {
  const directory = await openOwnDirectory(path, isContentChecked);
  const { mode } = await directory.stat();
  await directory.close();
  return mode & 0o7777;
}

test('a missing directory is made for its owner alone, and taken again', async () => {
  const path = join(base, 'above', 'own');
  expect(await modeOf(path)).toBe(0o700);
  expect(await modeOf(path)).toBe(0o700);
});

test('one that others may write to is closed to them', async () => {
  const path = join(base, 'open');
  await mkdir(path);
  await chmod(path, 0o1777);
  expect(await modeOf(path, false)).toBe(0o700);
});

test('a symbolic link in its place is refused', async () => {
  await mkdir(join(base, 'elsewhere'));
  await symlink(join(base, 'elsewhere'), join(base, 'link'));
  await expect(modeOf(join(base, 'link'))).rejects.toMatchObject({ code: 'SPEC_INVALID' });
});

test.each([['itself'], ['above']])('a file is refused at once: %s', async (place) => {
  const file = join(base, 'file');
  await writeFile(file, '');
  const path = place === 'itself' ? file : join(file, 'state');
  await expect(modeOf(path)).rejects.toMatchObject({ code: 'SPEC_INVALID', remedy: expect.any(String) });
});

test('a path below /proc is refused at once', async () => {
  const code = expect.stringMatching(/^(SPEC_INVALID|NOT_PERMITTED)$/);
  await expect(modeOf('/proc/vmigrate/state')).rejects.toMatchObject({ code });
});

test('a parent that others may write to is refused, and a sticky one is not', async () => {
  await chmod(base, 0o777);
  await expect(modeOf(join(base, 'own'))).rejects.toMatchObject({
    code: 'NOT_PERMITTED',
    remedy: expect.stringContaining('chmod go-w'),
  });
  await chmod(base, 0o1777);
  expect(await modeOf(join(base, 'own'))).toBe(0o700);
});

test.runIf(isRoot)('a directory that another user has made beforehand is refused, and stays as it is', async () => {
  const path = join(base, 'theirs');
  await mkdir(path, { mode: 0o755 });
  await chown(path, NOBODY, NOBODY);
  await expect(modeOf(path)).rejects.toMatchObject({
    code: 'NOT_PERMITTED',
    message: expect.stringContaining('belongs to user 65534'),
  });
  expect((await stat(path)).uid).toBe(NOBODY);
  await expect(modeOf(join(path, 'below'))).rejects.toMatchObject({
    code: 'NOT_PERMITTED',
    remedy: expect.stringContaining('chown root'),
  });
});

test.runIf(isRoot)('content of another user is refused', async () => {
  const path = join(base, 'own');
  await mkdir(join(path, 'VM'), { recursive: true });
  await chmod(path, 0o777);
  await chown(join(path, 'VM'), NOBODY, NOBODY);
  await expect(modeOf(path, false)).rejects.toMatchObject({
    code: 'CONFLICT',
    message: expect.stringContaining('VM belongs to user 65534'),
  });
});

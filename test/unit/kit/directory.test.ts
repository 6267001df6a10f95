import { chmod, mkdtemp, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { makeDirectories, makeSocketDirectory } from '../../../src/kit/directory.js';

let directory: string;
const at = (name: string): string => join(directory, name);

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-directory-'));
});
afterEach(() => rm(directory, { recursive: true, force: true }));

describe('a directory', () => {
  test('is made with those above it, and a second time too', async () => {
    expect(await makeDirectories(at('a/b/c'), 0o700)).toEqual([at('a'), at('a/b'), at('a/b/c')]);
    expect(await makeDirectories(at('a/b/c'), 0o755)).toEqual([]);
    expect((await stat(at('a/b'))).mode & 0o777).toBe(0o755);
    expect((await stat(at('a/b/c'))).mode & 0o777).toBe(0o700);
  });

  test('below a file is refused, and the file is named', async () => {
    await writeFile(at('file'), '');
    for (const path of ['file', 'file/below', 'file/below/deep'])
      await expect(makeDirectories(at(path), 0o700)).rejects.toMatchObject({
        code: 'SPEC_INVALID',
        message: expect.stringContaining(`${at('file')} is not a directory`),
      });
  });

  // Node's own recursive mkdir tries for ever here.
  test('that the kernel cannot make is refused at once', async () => {
    await expect(makeDirectories('/proc/vmigrate-none/state', 0o700)).rejects.toMatchObject({ code: 'SPEC_INVALID' });
  });
});

describe('the directory of a socket', () => {
  test('is made if it is missing', async () => {
    await makeSocketDirectory(at('run/vmigrate/api.sock'));
    expect((await stat(at('run/vmigrate'))).mode & 0o777).toBe(0o755);
  });

  test('may be everybody’s only if nobody can replace what others have put there', async () => {
    await chmod(directory, 0o777);
    await expect(makeSocketDirectory(at('api.sock'))).rejects.toMatchObject({
      code: 'NOT_PERMITTED',
      message: expect.stringContaining('everybody may write to it'),
    });
    await chmod(directory, 0o1777);
    await makeSocketDirectory(at('api.sock'));
  });
});

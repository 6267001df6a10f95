/** Files that a user names never make the daemon wait: FIFOs, file systems that do not answer. */
import { execFileSync } from 'node:child_process';
import { mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { fileSystemAnswers, openUserFile } from '../../../src/kit/user-file.js';

let directory: string;
const at = (name: string): string => join(directory, name);

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-user-file-'));
  await writeFile(at('file'), 'content');
});
afterEach(() => rm(directory, { recursive: true, force: true }));

describe('a file of a user', () => {
  test('is opened for reading and writing, also through a link', async () => {
    await symlink(at('file'), at('link'));
    const file = await openUserFile(at('link'), 'readWrite');
    await file.write('C', 0);
    expect((await file.read(Buffer.alloc(7), 0, 7, 0)).buffer.toString()).toBe('Content');
    await file.close();
  });

  test('that is missing or forbidden gets the error of the system', async () => {
    await expect(openUserFile(at('none'), 'read')).rejects.toMatchObject({ code: 'ENOENT' });
    await expect(openUserFile(directory, 'readWrite')).rejects.toMatchObject({ code: 'EISDIR' });
  });

  test('that is a FIFO, a socket, a directory or a character device is refused', async () => {
    execFileSync('mkfifo', [at('fifo')]);
    await expect(openUserFile(at('fifo'), 'read')).rejects.toMatchObject({ code: 'USAGE' });
    await expect(openUserFile(at('fifo'), 'readWrite')).rejects.toMatchObject({ code: 'USAGE' });
    await expect(openUserFile(directory, 'read')).rejects.toMatchObject({ code: 'USAGE' });
    await expect(openUserFile('/dev/null', 'read')).rejects.toMatchObject({ code: 'USAGE' });
    const server = createServer().listen(at('socket'));
    await expect(openUserFile(at('socket'), 'read')).rejects.toMatchObject({ code: 'ENXIO' });
    server.close();
  });

  // With plain open() each of these holds one of four threads until somebody writes to the FIFO.
  test('does not hold up other files, however many FIFOs are named', async () => {
    execFileSync('mkfifo', [at('fifo')]);
    const refused = Array.from({ length: 8 }, () => openUserFile(at('fifo'), 'read').catch((error: unknown) => error));
    expect(await readFile(at('file'), 'utf8')).toBe('content');
    for (const error of await Promise.all(refused)) expect(error).toMatchObject({ code: 'USAGE' });
  });

  test('on a file system that does not answer is given up after a time limit, and the process is killed', async () => {
    const error = await fileSystemAnswers('/mnt/gone/disk', {
      timeoutMs: 200,
      command: ['/bin/sh', '-c', `echo $$ > "$1"; exec sleep 600`, 'sh', at('pid')],
    }).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ code: 'TIMEOUT', message: expect.stringContaining('/mnt/gone/disk') });
    const pid = (await readFile(at('pid'), 'utf8')).trim();
    await expect.poll(() => readFile(`/proc/${pid}/stat`, 'utf8').catch(() => 'gone')).toBe('gone');
  });

  test('on file systems that do not answer uses a bounded number of processes', async () => {
    const command = ['/bin/sh', '-c', 'exec sleep 600'];
    const all = Array.from({ length: 33 }, () =>
      fileSystemAnswers('/mnt/gone', { timeoutMs: 500, command }).catch((error: Error) => error.message),
    );
    const messages = await Promise.all(all);
    expect(
      messages.filter((message) => /is not looked at: 32 other files have not answered yet/.test(String(message))),
    ).toHaveLength(1);
    await expect.poll(() => fileSystemAnswers(directory).then(() => 'answers', String)).toBe('answers');
  });
});

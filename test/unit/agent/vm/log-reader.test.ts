import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { appendFile, mkdtemp, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { LogReader } from '../../../../src/agent/vm/log-reader.js';
import { LAUNCHER } from '../../../../src/backends/qemu/launcher/launcher.js';

let directory: string;
let path: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-log-'));
  path = join(directory, 'log');
});
afterEach(() => rm(directory, { recursive: true }));

async function rest(reader: LogReader): Promise<string> {
  const buffer = Buffer.alloc(7);
  let text = '';
  for (let count = await reader.read(buffer); count > 0; count = await reader.read(buffer))
    text += buffer.toString('latin1', 0, count);
  return text;
}

async function rotate(): Promise<void> {
  await rename(`${path}.1`, `${path}.2`).catch(() => undefined);
  await rename(path, `${path}.1`);
  await writeFile(path, '');
}

test('every byte is read once and in order, however often the log is rotated in between', async () => {
  await writeFile(path, 'first ');
  const reader = await LogReader.open(path, 100);
  expect(await rest(reader)).toBe('first ');
  await appendFile(path, 'late ');
  await rotate();
  await appendFile(path, 'second ');
  await rotate();
  await appendFile(path, 'third');
  expect(await rest(reader)).toBe('late second third');
  expect(await rest(reader)).toBe('');
  await reader.close();
});

test('a backlog goes back into older files, and a reader that was overtaken goes on with what is left', async () => {
  await writeFile(`${path}.1`, 'older ');
  await writeFile(path, 'newer');
  const some = await LogReader.open(path, 7);
  expect(await rest(some)).toBe('r newer');
  await some.close();
  const all = await LogReader.open(path, Number.MAX_SAFE_INTEGER);
  expect(await rest(all)).toBe('older newer');
  await rotate();
  await rm(`${path}.2`);
  await writeFile(path, 'a');
  await rotate();
  await rm(`${path}.2`);
  await appendFile(path, 'b');
  expect(await rest(all)).toBe('ab');
  await all.close();
  await expect(LogReader.open(join(directory, 'none'), 0)).rejects.toMatchObject({ code: 'ENOENT' });
});

function spooled(limitBytes: number, keepCount: number, script: string) {
  const limits = ['--limit', String(limitBytes), '--keep', String(keepCount), '--mark', join(directory, 'mark')];
  const logs = ['--log', '1', path, '--log', '100', join(directory, 'serial')];
  return spawn(LAUNCHER, [...limits, ...logs, '--env', 'WORD=yes', '--', 'bash', '-c', script], {
    stdio: 'ignore',
    detached: true,
  });
}

const isKept = () => expect.poll(() => stat(join(directory, 'mark')).catch(() => null)).toBeNull();

test('the spool keeps the end of what a program writes, and nothing else of the program', async () => {
  const child = spooled(1000, 2, 'echo $WORD $$ >&2; seq 1 2000; echo serial >/proc/self/fd/100; exit 3');
  const { pid } = child;
  expect(await once(child, 'exit')).toEqual([3, null]);
  await isKept();
  const [oldest, older, newest] = await Promise.all(['.2', '.1', ''].map((end) => readFile(path + end, 'utf8')));
  expect([oldest?.length, older?.length]).toEqual([1000, 1000]);
  expect(newest?.length).toBeLessThanOrEqual(1000);
  const numbers = `${oldest}${older}${newest}`.split('\n').slice(1, -1).map(Number);
  expect(numbers.at(-1)).toBe(2000);
  expect(numbers).toEqual(Array.from({ length: numbers.length }, (_, index) => 2001 - numbers.length + index));
  expect(await readFile(join(directory, 'serial'), 'utf8')).toBe('serial\n');
  await expect(stat(`${path}.3`)).rejects.toMatchObject({ code: 'ENOENT' });
  const short = spooled(1000, 0, 'echo $WORD $$ >&2');
  await once(short, 'exit');
  await isKept();
  expect((await readFile(path, 'utf8')).endsWith(`yes ${short.pid}\n`)).toBe(true);
  expect(pid).not.toBe(short.pid);
});

test('a program that cannot be started says so in its log', async () => {
  const child = spawn(
    LAUNCHER,
    ['--limit', '1000', '--keep', '1', '--mark', join(directory, 'mark'), '--log', '1', path, '--', '/no/such/program'],
    { stdio: 'ignore' },
  );
  expect(await once(child, 'exit')).toEqual([127, null]);
  await isKept();
  expect(await readFile(path, 'utf8')).toContain('/no/such/program: No such file');
});

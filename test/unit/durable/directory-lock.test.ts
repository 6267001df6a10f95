import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, open, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { DirectoryLock } from '../../../src/durable/directory-lock.js';
import { loadNativeBinding } from '../../../src/native/binding.js';

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-lock-'));
});
afterEach(() => rm(directory, { recursive: true, force: true }));

const take = (): Promise<DirectoryLock> =>
  DirectoryLock.take(directory, (descriptor) => loadNativeBinding().lockFile(descriptor));

/** The lock of build 0.1.0: it compares pids, which mean nothing in another container. */
const withoutKernel = (): boolean => true;

test('a second open, also by the same process, is refused until the first is closed', async () => {
  const first = await take();
  const refusal = { code: 'CONFLICT', message: expect.stringContaining(String(process.pid)) as string };
  await expect(take()).rejects.toMatchObject(refusal);
  await first.giveBack();
  await (await take()).giveBack();
});

test('a lock that cannot be marked as free is given back all the same', async () => {
  const first = await take();
  // A directory in the place of the file that says so.
  for (const name of await readdir(directory)) {
    if (/^lock\.\d+$/.test(name)) await mkdir(join(directory, `${name}-free`));
  }
  await expect(first.giveBack()).rejects.toThrow();
  const locked = await open(join(directory, 'lock'), 'r+');
  expect(loadNativeBinding().lockFile(locked.fd)).toBe(true);
  await locked.close();
});

test('the lock of a process that was killed is taken over', async () => {
  const child = spawn('sleep', ['60']);
  const startTicks = (await readFile(`/proc/${child.pid}/stat`, 'utf8')).split(' ')[21];
  const boot = (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();
  await writeFile(join(directory, 'lock.4'), JSON.stringify({ pid: child.pid, startTicks, boot }));
  await expect(take()).rejects.toMatchObject({ code: 'CONFLICT' });
  child.kill('SIGKILL');
  await once(child, 'exit');
  await (await take()).giveBack();
  expect((await readdir(directory)).filter((name) => name.startsWith('lock'))).toEqual(['lock', 'lock.5']);
});

test.each([
  ['a pid used again', { pid: process.pid, startTicks: '1', boot: 'this' }],
  ['another boot', { pid: process.pid, startTicks: 'mine', boot: 'other' }],
  ['nothing', null],
])('the lock of %s is taken over', async (_, holder) => {
  const boot = (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();
  const mine = (await readFile('/proc/self/stat', 'utf8')).replace(/^.*\) /, '').split(' ')[19];
  const text = JSON.stringify(holder)?.replace('"this"', `"${boot}"`).replace('"mine"', `"${mine}"`);
  await writeFile(join(directory, 'lock.1'), holder === null ? '' : text);
  await (await take()).giveBack();
});

test('of many that find a stale lock at once, one gets it', async () => {
  await writeFile(join(directory, 'lock.1'), JSON.stringify({ pid: 1, startTicks: 'never', boot: 'never' }));
  const opens = await Promise.allSettled(Array.from({ length: 8 }, () => take()));
  const winners = opens.filter((open) => open.status === 'fulfilled');
  expect(winners).toHaveLength(1);
  for (const { value } of winners) await value.giveBack();
});

test('a holder that cannot be seen, as one in another container or on another host, is respected', async () => {
  const first = await take();
  // To a process in another pid namespace the numbered lock looks like that of a dead process.
  await writeFile(join(directory, 'lock.1'), JSON.stringify({ pid: 1, startTicks: 'never', boot: 'never' }));
  await (await DirectoryLock.take(directory, withoutKernel)).giveBack();
  const refusal = { code: 'CONFLICT', message: expect.stringContaining(`process ${process.pid} on `) as string };
  await expect(take()).rejects.toMatchObject(refusal);
  await first.giveBack();
  await (await take()).giveBack();
});

test('the lock is not inherited by children, and ends with its holder', async () => {
  const first = await take();
  const child = spawn('sleep', ['60']);
  await first.giveBack();
  await (await take()).giveBack();
  child.kill('SIGKILL');
  await once(child, 'exit');
});

test('a second process is refused while the lock is held, and told by whom', async () => {
  const first = await take();
  // flock(1) takes the same lock as a daemon in another namespace would.
  const other = promisify(execFile)('flock', [
    '--nonblock',
    '--conflict-exit-code',
    '9',
    join(directory, 'lock'),
    'true',
  ]);
  await expect(other).rejects.toMatchObject({ code: 9 });
  await first.giveBack();
  await promisify(execFile)('flock', ['--nonblock', join(directory, 'lock'), 'true']);
});

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { afterEach, expect, test } from 'vitest';
import { endProcessesOf, mountNamespaceOf, usersWithProcesses } from '../../../../src/agent/contain/processes.js';
import { UserPool } from '../../../../src/agent/contain/users.js';
import { identityOf, isAlive } from '../../../../src/kit/process.js';

const FROM = 1_950_000_000 + (process.pid % 10_000) * 4;
const USERS = { from: FROM, count: 3 };
/** Its first thread ends, and another lives on. */
const SURVIVOR = `
import ctypes, os, threading, time
os.setuid(${FROM})
threading.Thread(target=lambda: time.sleep(60)).start()
os.write(1, b"ready")
ctypes.CDLL(None).syscall(60, 0)
`;
let child: ChildProcess | null = null;
afterEach(() => child?.kill('SIGKILL'));

async function survivor(): Promise<number> {
  child = spawn('python3', ['-c', SURVIVOR], { stdio: ['ignore', 'pipe', 'inherit'] });
  await once(child.stdout as NodeJS.ReadableStream, 'data');
  return child.pid ?? 0;
}

test('a process whose first thread has ended is alive as long as another lives', async () => {
  const identity = await identityOf(await survivor());
  await expect.poll(() => usersWithProcesses(USERS)).toEqual(new Set([FROM]));
  expect(await isAlive(identity)).toBe(true);
  const [own, other] = [mountNamespaceOf(process.pid), 'mnt:[1]'];
  await endProcessesOf(FROM, other);
  expect(await isAlive(identity), 'a process of another VM of this user').toBe(true);
  await endProcessesOf(FROM, own);
  expect(usersWithProcesses(USERS)).toEqual(new Set());
  expect(await isAlive(identity)).toBe(false);
});

test('a user that has a process, whoever has made it, is given to no VM', async () => {
  await survivor();
  const pool = new UserPool(USERS, '/state');
  const used = new Set<number>();
  const take = () =>
    pool.with(
      () => used,
      (uid) => Promise.resolve(used.add(uid ?? 0)),
    );
  await Promise.all([take(), take()]);
  expect([...used].sort((left, right) => left - right)).toEqual([FROM + 1, FROM + 2]);
  await expect(take()).rejects.toMatchObject({ code: 'OUT_OF_MEMORY' });
  await endProcessesOf(FROM, mountNamespaceOf(process.pid));
  await take();
  expect(used.has(FROM)).toBe(true);
});

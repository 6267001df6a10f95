/** What is known of a process when the daemon has no descriptors left. The limit is real, in a process of its own. */
import { execFile, spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, expect, test } from 'vitest';
import { endProcess, identityOf, isAlive } from '../../../src/kit/process.js';

const ROOT = fileURLToPath(new URL('../../..', import.meta.url));
const children: ReturnType<typeof spawn>[] = [];

afterEach(() => {
  for (const child of children.splice(0)) child.kill('SIGKILL');
});

/** Uses up all descriptors, then asks for a living process, ends it, and asks again. */
const SCRIPT = `
  import { spawn } from 'node:child_process';
  import { openSync } from 'node:fs';
  import { endProcess, identityOf, isAlive } from './src/kit/process.ts';
  import { keepSpareDescriptor } from './src/kit/spare-descriptor.ts';
  keepSpareDescriptor();
  const child = spawn('sleep', ['600'], { stdio: 'ignore' });
  const identity = await identityOf(child.pid);
  const useUp = () => { try { for (;;) openSync('/dev/null', 'r'); } catch (error) { return error.code; } };
  const full = useUp();
  const before = await isAlive(identity);
  await endProcess(identity, 0);
  const { stdout } = process;
  stdout.write(JSON.stringify({ full, before, after: await isAlive(identity) }));
  process.exit(0);
`;

test('a process that lives is not taken for dead for want of descriptors, and can be ended', async () => {
  const command = `ulimit -n 64; exec "$0" --import tsx --input-type=module -e "$1"`;
  const { stdout } = await promisify(execFile)('bash', ['-c', command, process.execPath, SCRIPT], { cwd: ROOT });
  expect(JSON.parse(stdout)).toEqual({ full: 'EMFILE', before: true, after: false });
});

test('a process is ended and known to have ended', async () => {
  const child = spawn('sleep', ['600'], { stdio: 'ignore' });
  children.push(child);
  const identity = await identityOf(child.pid ?? 0);
  expect(await isAlive(identity)).toBe(true);
  expect(await isAlive({ ...identity, startTicks: '1' })).toBe(false);
  await endProcess(identity, 1000);
  expect(await isAlive(identity)).toBe(false);
});

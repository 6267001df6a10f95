/** Consoles at their limits: a log that grows while it is read, and limits of the host, which are told. */
import { execFile } from 'node:child_process';
import { appendFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { openConsole } from '../../../../src/agent/vm/console.js';

const ROOT = fileURLToPath(new URL('../../../..', import.meta.url));

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-console-'));
  await writeFile(join(directory, 'serial.log'), 'hello\n');
});
afterEach(() => rm(directory, { recursive: true }));

/** Opens consoles in a process of its own, as `prepare` says. Returns what its errors are, and what stays. */
async function openIn(
  wrapper: readonly [string, ...string[]],
  prepare: string,
): Promise<{ codes: string[]; openedMore: number }> {
  const script = `
    import { readdirSync, openSync, closeSync } from 'node:fs';
    import { createServer } from 'node:net';
    import { openConsole } from '${ROOT}src/agent/vm/console.js';
    const socketPath = '${directory}/serial.sock';
    const server = createServer((socket) => socket.resume());
    await new Promise((resolve) => server.listen(socketPath, () => resolve(undefined)));
    const options = { socketPath, logPath: '${directory}/serial.log', backlogBytes: 100, isFollowing: true };
    const connections = () => new Promise((resolve) => server.getConnections((_, count) => resolve(count)));
    const open = async () => openConsole(options).then((line) => (line.destroy(), 'opened'), (error) => error.code);
    await open();
    while ((await connections()) > 0) await new Promise((next) => setImmediate(next));
    const count = () => readdirSync('/proc/self/fd').length;
    const before = count();
    const codes = [];
    ${prepare}
    while ((await connections()) > 0) await new Promise((next) => setTimeout(next, 5));
    console.log(JSON.stringify({ codes, openedMore: count() - before }));
    process.exit(0);`;
  const file = join(directory, 'script.mts');
  await writeFile(file, script);
  const [program, ...args] = [...wrapper, process.execPath, '--import', 'tsx', file];
  const { stdout } = await promisify(execFile)(program, args, { cwd: ROOT, timeout: 25_000 });
  return JSON.parse(stdout) as { codes: string[]; openedMore: number };
}

test('the log of a guest that writes without end has an end all the same', async () => {
  const logPath = join(directory, 'serial.log');
  await writeFile(logPath, 'x'.repeat(300_000));
  const past = { socketPath: null, backlogBytes: Number.MAX_SAFE_INTEGER, isFollowing: false };
  const line = await openConsole({ ...past, logPath });
  let lengthBytes = 0;
  for await (const data of line as AsyncIterable<Buffer>) {
    lengthBytes += data.length;
    if (lengthBytes > 10_000_000) break;
    appendFileSync(logPath, 'y'.repeat(data.length * 2));
  }
  expect(lengthBytes).toBe(300_000);
});

test('a console that cannot be opened for want of file watches leaves nothing open', async () => {
  const noWatches = 'echo 0 >/proc/sys/user/max_inotify_watches && exec "$0" "$@"';
  const seen = await openIn(
    ['unshare', '--user', '--map-root-user', 'sh', '-c', noWatches],
    'for (let turn = 0; turn < 3; turn++) codes.push(await open());',
  );
  expect(seen.codes).toEqual(Array(3).fill('OUT_OF_MEMORY'));
  expect(seen.openedMore).toBeLessThanOrEqual(0);
});

test('a console that cannot be opened for want of descriptors leaves nothing open', async () => {
  // Two are left, for the connection and one of its server's end and the log.
  const prepare = `
    const held = [];
    try { for (;;) held.push(openSync('/dev/null', 'r')); } catch {}
    for (const one of held.splice(0, 2)) closeSync(one);
    codes.push(await open());
    for (const one of held) closeSync(one);`;
  const seen = await openIn(['prlimit', '--nofile=256:256'], prepare);
  expect(seen.codes).toEqual(['OUT_OF_MEMORY']);
  expect(seen.openedMore).toBeLessThanOrEqual(0);
});

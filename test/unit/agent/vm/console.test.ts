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
    import { fork } from 'node:child_process';
    import { once } from 'node:events';
    import { readdirSync, readlinkSync, openSync, closeSync } from 'node:fs';
    import { openConsole } from '${ROOT}src/agent/vm/console.js';
    const server = fork('${directory}/server.cjs', { execArgv: [], stdio: ['ignore', 'ignore', 'ignore', 'ipc'] });
    await once(server, 'message');
    const socketPath = '${directory}/serial.sock';
    const options = { socketPath, logPath: '${directory}/serial.log', backlogBytes: 100, isFollowing: true };
    const open = async () => openConsole(options).then((line) => (line.destroy(), 'opened'), (error) => error.code);
    const opened = () => readdirSync('/proc/self/fd');
    const target = (fd) => { try { return readlinkSync('/proc/self/fd/' + fd); } catch { return ''; } };
    const socketCount = () => opened().filter((fd) => target(fd).startsWith('socket:')).length;
    const idle = socketCount();
    const untilClosed = async () => {
      while (socketCount() > idle) await new Promise((next) => setTimeout(next, 5));
    };
    await open();
    await untilClosed();
    const before = opened().length;
    const codes = [];
    ${prepare}
    await untilClosed();
    console.log(JSON.stringify({ codes, openedMore: opened().length - before }));
    server.kill();
    process.exit(0);`;
  // A process of its own, so that its descriptors are not the console's.
  const listen = `listen('${directory}/serial.sock', () => process.send('listens'))`;
  const server = `require('node:net').createServer((socket) => socket.resume()).${listen};`;
  await writeFile(join(directory, 'server.cjs'), server);
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
  // One is left, for the connection.
  const prepare = `
    const held = [];
    try { for (;;) held.push(openSync('/dev/null', 'r')); } catch {}
    for (const one of held.splice(0, 1)) closeSync(one);
    codes.push(await open());
    for (const one of held) closeSync(one);`;
  const seen = await openIn(['prlimit', '--nofile=256:256'], prepare);
  expect(seen.codes).toEqual(['OUT_OF_MEMORY']);
  expect(seen.openedMore).toBeLessThanOrEqual(0);
});

import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { GuestAgent } from '../../../../src/backends/qemu/guest-agent.js';
import { codeOf } from '../../../hosts/vm-host.js';

interface Request {
  readonly execute: string;
  readonly arguments: Record<string, unknown>;
}

let directory: string;
let path: string;
let server: Server;
const sockets = new Set<Socket>();

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-agent-'));
  path = join(directory, 'agent.sock');
});
afterEach(async () => {
  for (const socket of sockets) socket.destroy();
  server.close();
  await rm(directory, { recursive: true });
});

/** The answers of QEMU's socket and of an agent in the guest. Undefined: no answer. */
async function serve(answer: (request: Request) => unknown): Promise<Request[]> {
  const seen: Request[] = [];
  server = createServer((socket) => {
    sockets.add(socket);
    socket.on('error', () => undefined);
    socket.on('data', (data) => {
      for (const line of data.toString().trim().split('\n')) {
        const request = JSON.parse(line) as Request;
        seen.push(request);
        const reply = answer(request);
        if (reply !== undefined) socket.write(typeof reply === 'string' ? reply : `${JSON.stringify(reply)}\n`);
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  return seen;
}

const inSync = (request: Request) =>
  request.execute === 'guest-sync' ? { return: request.arguments['id'] } : undefined;

test('commands are answered, and refusals have their reason', async () => {
  await serve((request) => inSync(request) ?? (request.execute === 'a' ? { return: 1 } : { error: { desc: 'no b' } }));
  const agent = await GuestAgent.connect(path, 5000);
  expect(await agent.execute('a')).toBe(1);
  await expect(agent.execute('b')).rejects.toMatchObject({
    code: 'QEMU_FAILED',
    message: expect.stringContaining('no b'),
  });
  agent.close();
  expect(await codeOf(agent.execute('a'))).toBe('QEMU_GONE');
});

test('what is left of an answer to somebody else is passed over', async () => {
  let isFirst = true;
  await serve((request) => {
    if (!isFirst) return inSync(request) ?? { return: {} };
    isFirst = false;
    return '"cut off"}\n{"return": 17}\n';
  });
  const agent = await GuestAgent.connect(path, 10_000);
  expect(await agent.execute('guest-ping')).toEqual({});
  agent.close();
});

test('a program runs until it ends, and its failure is one', async () => {
  const statuses = [{ exited: false }, { exited: true, exitcode: 0 }, { exited: true, exitcode: 3 }];
  const seen = await serve((request) => {
    if (request.execute === 'guest-exec') return { return: { pid: 77 } };
    return inSync(request) ?? { return: statuses.shift() };
  });
  const agent = await GuestAgent.connect(path, 5000);
  await agent.run('/bin/hostname', ['web-3'], 5000);
  expect(seen).toContainEqual({ execute: 'guest-exec', arguments: { path: '/bin/hostname', arg: ['web-3'] } });
  expect(seen).toContainEqual({ execute: 'guest-exec-status', arguments: { pid: 77 } });
  await expect(agent.run('/bin/hook', [], 5000)).rejects.toMatchObject({
    message: expect.stringContaining('ended with 3'),
  });
  agent.close();
});

describe('nobody waits for ever', () => {
  test('for an agent that is not there', async () => {
    await serve(() => undefined);
    expect(await codeOf(GuestAgent.connect(path, 50))).toBe('TIMEOUT');
  });

  test('for an answer', async () => {
    await serve(inSync);
    const agent = await GuestAgent.connect(path, 5000);
    expect(await codeOf(agent.execute('guest-ping', {}, 50))).toBe('TIMEOUT');
    expect(await codeOf(agent.execute('guest-ping'))).toBe('QEMU_GONE');
  });

  test('on a port that closes', async () => {
    await serve((request) => inSync(request));
    const agent = await GuestAgent.connect(path, 5000);
    const asked = codeOf(agent.execute('guest-ping'));
    for (const socket of sockets) socket.destroy();
    expect(await asked).toBe('QEMU_GONE');
  });

  test('for the end of a line', async () => {
    await serve((request) => inSync(request) ?? 'x'.repeat(2 ** 20 + 1));
    const agent = await GuestAgent.connect(path, 5000);
    expect(await codeOf(agent.execute('guest-ping'))).toBe('PEER_PROTOCOL');
  });
});

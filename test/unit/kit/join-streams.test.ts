/** Real sockets: what counts is what their other ends see. */
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { joinStreams } from '../../../src/kit/join-streams.js';

const MANY = Buffer.alloc(1 << 20, 'x');

let directory: string;
let server: Server;
/** What joinStreams joins, and the ends that use it. */
let inner: [Socket, Socket];
let outer: [Socket, Socket];

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-join-'));
  server = createServer({ allowHalfOpen: true });
  server.listen(join(directory, 'socket'));
  await once(server, 'listening');
  const pairs = [await pair(), await pair()] as const;
  inner = [pairs[0][0], pairs[1][0]];
  outer = [pairs[0][1], pairs[1][1]];
});
afterEach(async () => {
  for (const socket of [...inner, ...outer]) socket.destroy();
  server.close();
  await rm(directory, { recursive: true, force: true });
});

async function pair(): Promise<[Socket, Socket]> {
  const outside = connect({ path: join(directory, 'socket'), allowHalfOpen: true });
  const [inside] = (await once(server, 'connection')) as [Socket];
  outside.on('error', () => undefined);
  return [inside, outside];
}

async function allOf(socket: Socket): Promise<number> {
  let bytes = 0;
  socket.on('data', (chunk: Buffer) => {
    bytes += chunk.length;
  });
  await once(socket, 'end');
  return bytes;
}

test('an end comes after all bytes, and the other way stays open', async () => {
  joinStreams(...inner);
  const [one, other] = outer;
  one.end(MANY);
  expect(await allOf(other)).toBe(MANY.length);
  other.end('answer');
  expect(await allOf(one)).toBe('answer'.length);
});

test('whoever writes to a stream whose other end has closed is told', async () => {
  joinStreams(...inner);
  const [one, other] = outer;
  const isClosed = new Promise((resolve) => one.once('close', resolve));
  const writing = setInterval(() => one.write(MANY), 1);
  other.destroy();
  one.resume();
  await isClosed;
  clearInterval(writing);
  expect(inner.map(({ destroyed }) => destroyed)).toEqual([true, true]);
});

test('a stream that has broken before it is joined breaks the other one', async () => {
  inner[0].destroy();
  await once(inner[0], 'close');
  joinStreams(...inner);
  outer[1].resume();
  await once(outer[1], 'end');
  expect(inner[1].destroyed).toBe(true);
});

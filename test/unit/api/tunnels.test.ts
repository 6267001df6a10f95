/** Tunnels between hosts: an upgrade over real mutual TLS, with an end behind it that a test controls. */
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Duplex, PassThrough } from 'node:stream';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { RemoteAgents } from '../../../src/api/peers/client.js';
import { diskEnd, openTunnel } from '../../../src/api/peers/tunnel.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { MigrationError } from '../../../src/domain/errors.js';
import { Authority } from '../../../src/tls/authority.js';
import { TlsStore } from '../../../src/tls/store.js';
import { type FakeServices, fakeServices } from '../../support/api-fakes.js';

const IMAGE = '00ff'.repeat(4);
const SESSION = '5'.repeat(32);
/** More than the requests of one host may have, and more than may be in a handshake at once. */
const MANY = 120;

let directory: string;
let authority: Authority;
let services: FakeServices;
let server: ApiServer;
let url: string;
const closers: (() => unknown)[] = [];
const at = (name: string): string => join(directory, name);

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-tunnels-'));
  authority = await Authority.create(at('ca'), 'test');
  for (const name of ['A', 'B', 'C']) await authority.issue({ role: 'host', name }, ['127.0.0.1'], at(name));
});
afterAll(() => rm(directory, { recursive: true, force: true }));

beforeEach(async () => {
  const store = new TlsStore(at('A'), () => undefined);
  services = fakeServices({ tls: store });
  server = buildServer(services);
  url = `https://127.0.0.1:${await server.listenTls('127.0.0.1', 0, store)}`;
  closers.push(
    () => server.close(),
    () => store.close(),
  );
});
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

function remote(self: string): RemoteAgents {
  const store = new TlsStore(at(self), () => undefined);
  const agents = new RemoteAgents({ self, store, peers: { A: url }, local: () => services.agent });
  closers.push(
    () => store.close(),
    () => agents.close(),
  );
  return agents;
}

/** What the other side of each connection has asked for, and the connection. */
function exportsOf(): { asked: string[]; connections: Duplex[] } {
  const asked: string[] = [];
  const connections: Duplex[] = [];
  services.agent.forks.openDisk = async (...args) => {
    asked.push(args.join(' '));
    const connection = new PassThrough();
    connections.push(connection);
    return connection;
  };
  return { asked, connections };
}

async function read(stream: Duplex, length: number): Promise<string> {
  const chunks: Buffer[] = [];
  for (let bytes = 0; bytes < length; ) {
    const [chunk] = (await once(stream, 'data')) as [Buffer];
    chunks.push(chunk);
    bytes += chunk.length;
  }
  return Buffer.concat(chunks).toString();
}

test('a host that is known gets the bytes of the disk, there and back', async () => {
  const { asked, connections } = exportsOf();
  const tunnel = await remote('B').openDisk('A', IMAGE, 'disk0');
  expect(asked).toEqual([`${IMAGE} disk0 B`]);
  tunnel.write('greetings');
  expect(await read(tunnel, 9)).toBe('greetings');
  const isGone = once(connections[0] as Duplex, 'close');
  tunnel.destroy();
  await isGone;
});

test('the end of the export ends the connection', async () => {
  const { connections } = exportsOf();
  const tunnel = await remote('B').openDisk('A', IMAGE, 'disk0');
  tunnel.resume();
  const isGone = once(tunnel, 'close');
  connections[0]?.destroy();
  await isGone;
});

test('a refusal comes with its reason', async () => {
  services.agent.forks.openDisk = async () => {
    throw new MigrationError('NOT_FOUND', 'no such disk');
  };
  await expect(remote('B').openDisk('A', IMAGE, 'disk0')).rejects.toMatchObject({
    code: 'NOT_FOUND',
    message: expect.stringContaining('no such disk'),
  });
  const { asked } = exportsOf();
  await expect(remote('C').openDisk('A', IMAGE, 'disk0')).rejects.toMatchObject({ code: 'NOT_PERMITTED' });
  await expect(remote('B').openDisk('A', '../../x', 'disk0')).rejects.toMatchObject({ code: 'NOT_FOUND' });
  expect(asked).toEqual([]);
  await server.close();
  await expect(remote('B').openDisk('A', IMAGE, 'disk0')).rejects.toMatchObject({ code: 'UNREACHABLE' });
});

test('the stream of a session is for its source alone, and ends at both sides', async () => {
  services.ties.sources.set(SESSION, 'B');
  const streams: Duplex[] = [];
  services.agent.target.openStream = async () => {
    const stream = new PassThrough();
    streams.push(stream);
    return stream;
  };
  await expect(remote('C').openStream('A', SESSION)).rejects.toMatchObject({ code: 'NOT_PERMITTED' });
  expect(streams).toEqual([]);
  const tunnel = await remote('B').openStream('A', SESSION);
  tunnel.write('pages');
  expect(await read(tunnel, 5)).toBe('pages');
  expect(services.audited.map(({ who, what, result }) => [who, what, result])).toEqual([
    ['host/C', 'openStream', 'NOT_PERMITTED'],
    ['host/B', 'openStream', 'ok'],
  ]);
  const isGone = once(tunnel, 'close');
  streams[0]?.destroy();
  await isGone;
});

test('the connections of many clones do not count as calls', async () => {
  exportsOf();
  const agents = remote('B');
  const tunnels: Duplex[] = [];
  for (let index = 0; index < MANY; index++) tunnels.push(await agents.openDisk('A', IMAGE, 'disk0'));
  expect((await agents.ping('A')).roundTripMs).toBeGreaterThan(0);
  for (const tunnel of tunnels) tunnel.destroy();
});

test('a host whose certificate is revoked loses its connections', async () => {
  exportsOf();
  await authority.issue({ role: 'host', name: 'B' }, [], at('B-lost'));
  const store = new TlsStore(at('B-lost'), () => undefined);
  const lost = new RemoteAgents({ self: 'B', store, peers: { A: url }, local: () => services.agent });
  closers.push(
    () => store.close(),
    () => lost.close(),
  );
  const tunnel = await lost.openDisk('A', IMAGE, 'disk0');
  tunnel.resume();
  const isGone = once(tunnel, 'close');
  await authority.revoke('B');
  await authority.copyRevocations(at('A'));
  await isGone;
});

test('a refusal whose body never ends is given up', async () => {
  const [theirs, own] = ['A', 'B'].map((name) => new TlsStore(at(name), () => undefined)) as [TlsStore, TlsStore];
  const silent = createServer(theirs.options(), (_, response) => {
    response.writeHead(409, { 'content-length': 100 });
    response.write('{');
  });
  silent.listen(0, '127.0.0.1');
  await once(silent, 'listening');
  const { port } = silent.address() as AddressInfo;
  closers.push(
    () => silent.close(),
    () => silent.closeAllConnections(),
    () => theirs.close(),
    () => own.close(),
  );
  const place = { host: 'A', url: `https://127.0.0.1:${port}`, ...diskEnd(IMAGE, 'd0'), tls: own.options() };
  await expect(openTunnel({ ...place, openMs: 300 })).rejects.toThrow(MigrationError);
});

/** Connections of strangers and of slow callers: they delay neither the end of the daemon nor other callers. */
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { Agent, request as httpsRequest } from 'node:https';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { connect as tlsConnect } from 'node:tls';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { ApiClient } from '../../../src/api/client.js';
import { RemoteAgents } from '../../../src/api/peers/client.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { Authority } from '../../../src/tls/authority.js';
import { TlsStore } from '../../../src/tls/store.js';
import { type FakeServices, fakeServices } from '../../support/api-fakes.js';

let directory: string;
let authority: Authority;
let services: FakeServices;
let server: ApiServer;
let port: number;
let store: TlsStore;
let isClosed: boolean;
const sockets: Socket[] = [];
const at = (name: string): string => join(directory, name);

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-connections-'));
  authority = await Authority.create(at('ca'), 'test');
  for (const name of ['A', 'B']) await authority.issue({ role: 'host', name }, ['127.0.0.1'], at(name));
  await authority.issue({ role: 'user', name: 'alice', userRole: 'operator' }, [], at('alice'));
});
afterAll(() => rm(directory, { recursive: true, force: true }));

beforeEach(async () => {
  isClosed = false;
  store = new TlsStore(at('A'), () => undefined);
  services = fakeServices({ tls: store });
  server = buildServer(services);
  port = await server.listenTls('127.0.0.1', 0, store);
});
afterEach(async () => {
  for (const socket of sockets.splice(0)) socket.destroy();
  if (!isClosed) await server.close();
  store.close();
});

/** A connection that says nothing, and whether the server has ended it. */
async function stranger(): Promise<{ socket: Socket; isEnded: () => boolean }> {
  const socket = connect(port, '127.0.0.1');
  let isEnded = false;
  socket.on('error', () => undefined);
  socket.once('close', () => (isEnded = true));
  sockets.push(socket);
  await once(socket, 'connect');
  return { socket, isEnded: () => isEnded };
}

const alice = (): ApiClient => new ApiClient({ host: `https://127.0.0.1:${port}`, tls: at('alice') });

function peersOfB(folder = 'B', portOfA = port): RemoteAgents {
  return new RemoteAgents({
    self: 'B',
    store: new TlsStore(at(folder), () => undefined),
    peers: { A: `https://127.0.0.1:${portOfA}` },
    local: () => {
      throw new Error('not called');
    },
  });
}

describe('a connection that never begins TLS', () => {
  // The old server waited until the stranger hung up.
  test('does not delay the end of the server', async () => {
    const { socket } = await stranger();
    // The server has taken the stranger's connection before it answers this.
    await alice().get('/v1/vms');
    isClosed = true;
    const closed = server.close();
    await once(socket, 'close');
    await closed;
  });

  test('gives way to newer ones of its address, and leaves room for those with a certificate', async () => {
    const strangers: { isEnded: () => boolean }[] = [];
    for (let count = 0; count < 40; count++) strangers.push(await stranger());
    await expect.poll(() => strangers.filter(({ isEnded }) => isEnded()).length).toBe(8);
    expect(strangers.slice(0, 8).every(({ isEnded }) => isEnded())).toBe(true);
    expect(await alice().get('/v1/vms')).toEqual(expect.any(Array));
    expect(await peersOfB().ping('A')).toMatchObject({ roundTripMs: expect.any(Number) });
  });
});

describe('connections without a certificate', () => {
  const ca = () => readFileSync(join(at('A'), 'ca.pem'));
  const connectTls = async () => {
    const socket = tlsConnect({ port, host: '127.0.0.1', ca: ca(), checkServerIdentity: () => undefined });
    socket.on('error', () => undefined);
    sockets.push(socket);
    await once(socket, 'secureConnect');
    return socket;
  };

  test('give way to newer ones, but not when they have shown a token', async () => {
    await services.tokens.create({ name: 'ci', role: 'viewer', createdBy: 'test', expiresInMs: 1 });
    const known = new Agent({ keepAlive: true, maxSockets: 1 });
    const get = () =>
      new Promise<number | undefined>((resolve, reject) => {
        const options = { ca: ca(), agent: known, checkServerIdentity: () => undefined };
        const headers = { authorization: 'Bearer token-ci' };
        const request = httpsRequest(`https://127.0.0.1:${port}/v1/vms`, { ...options, headers }, (response) => {
          response.resume();
          response.once('end', () => resolve(response.statusCode));
        });
        request.on('socket', (socket) => sockets.push(socket));
        request.on('error', reject);
        request.end();
      });
    expect(await get()).toBe(200);
    const [own] = sockets;
    const strangers: Socket[] = [];
    for (let count = 0; count < 20; count++) strangers.push(await connectTls());
    await expect
      .poll(() => strangers.map(({ destroyed }) => destroyed))
      .toEqual(strangers.map((_, index) => index < 4));
    expect(await get()).toBe(200);
    expect(sockets.filter((socket) => socket === own).length, 'the same connection').toBeGreaterThan(1);
    known.destroy();
  });
});

describe('a request whose body does not arrive', () => {
  test('does not delay the end of the server, nor keep hosts out', async () => {
    const [ca, cert, key] = ['ca.pem', 'cert.pem', 'key.pem'].map((name) => readFileSync(join(at('alice'), name)));
    const ends: string[] = [];
    const begin = () => {
      const options = { ca, cert, key, method: 'POST', agent: false, checkServerIdentity: () => undefined };
      const headers = { 'content-type': 'application/json', 'content-length': 100 };
      const request = httpsRequest(`https://127.0.0.1:${port}/v1/vms`, { ...options, headers });
      request.on('error', () => ends.push('ended'));
      request.on('socket', (socket) => sockets.push(socket));
      request.write('{');
      return request;
    };
    for (let count = 0; count < 60; count++) begin();
    // 48 connections of one user are kept, the others are refused.
    await expect.poll(() => ends.length).toBe(12);
    expect(await peersOfB().ping('A')).toMatchObject({ roundTripMs: expect.any(Number) });
    isClosed = true;
    await server.close();
    await expect.poll(() => ends.length).toBe(60);
  });
});

describe('the check of a peer', () => {
  test('names a certificate that has expired since the connection was made', async () => {
    await authority.issue({ role: 'host', name: 'A' }, ['127.0.0.1'], at('A-later'));
    const later = new TlsStore(at('A-later'), () => undefined);
    const expiring = buildServer(fakeServices({ tls: later }));
    const peers = peersOfB('B', await expiring.listenTls('127.0.0.1', 0, later));
    expect(await peers.check('A')).toMatchObject({ roundTripMs: expect.any(Number) });
    await authority.issue({ role: 'host', name: 'A' }, ['127.0.0.1'], at('A-later'), -1);
    await expect.poll(() => Date.parse(later.expiresAt) < Date.now()).toBe(true);
    await peers.ping('A'); // on the connection that is kept
    await expect(peers.check('A')).rejects.toMatchObject({
      code: 'UNAUTHENTICATED',
      message: expect.stringContaining('CERT_HAS_EXPIRED'),
      remedy: expect.stringContaining('clocks'),
    });
    peers.close();
    later.close();
    await expiring.close();
  });

  test('names the own certificate if the peer refuses it', async () => {
    await authority.issue({ role: 'host', name: 'B' }, ['127.0.0.1'], at('B-expired'), -1);
    const peers = peersOfB('B-expired');
    await expect(peers.check('A')).rejects.toMatchObject({
      code: 'UNAUTHENTICATED',
      message: expect.stringMatching(/the certificate of this host expired on/),
    });
    peers.close();
  });

  test('ends calls for which others wait, to a host that has vanished behind a connection that is kept', async () => {
    let isThere = true;
    const proxy = createServer((near) => {
      sockets.push(near);
      near.on('error', () => undefined);
      if (!isThere) return;
      const far = connect(port, '127.0.0.1');
      far.on('error', () => undefined);
      near.on('data', (data) => isThere && far.write(data));
      far.on('data', (data) => isThere && near.write(data));
      near.once('close', () => far.destroy());
    }).listen(0, '127.0.0.1');
    await once(proxy, 'listening');
    const peers = peersOfB('B', (proxy.address() as AddressInfo).port);
    const { inventory, forks } = peers.agent('A');
    const gone = { code: 'UNREACHABLE', message: expect.stringContaining('does not answer any more') };
    await peers.warm('A');
    isThere = false;
    const calls = [
      inventory.inventory(),
      forks.loadClones('00112233445566ff'),
      peers.sendForkState('A', '00112233445566ff', Readable.from([Buffer.alloc(300_000)])),
    ];
    await Promise.all(calls.map((call) => expect(call).rejects.toMatchObject(gone)));
    peers.close();
    proxy.close();
  }, 20_000);
});

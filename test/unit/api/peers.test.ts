/** Host to host: real mutual TLS over loopback between two servers, with fakes behind them. */
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer as createTlsServer, request as httpsRequest } from 'node:https';
import { type AddressInfo, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { ApiClient } from '../../../src/api/client.js';
import { RemoteAgents } from '../../../src/api/peers/client.js';
import { callOn, HOST_CALLS } from '../../../src/api/peers/methods.js';
import { callPath, DEVICE_STATE_BYTES_MAX, PING_PATH, serialPath, statePath } from '../../../src/api/peers/routes.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { MigrationError } from '../../../src/domain/errors.js';
import type { HostPort } from '../../../src/engine/ports/host.js';
import { Authority } from '../../../src/tls/authority.js';
import { TlsStore } from '../../../src/tls/store.js';
import { type FakeServices, fakeServices } from '../../support/api-fakes.js';
import { forkAnswers, forkInventory, forkRequest, IMAGE } from '../planner/fork-facts.js';

const SESSION = 'ab'.repeat(16);

/** A host may be moved from a host that runs the previous build. The calls of that build must exist. */
const CALLS_OF_PREVIOUS_BUILDS = [
  ...['inventory', 'vmInventory', 'checkTarget'],
  ...['reserve', 'unreserve', 'expose', 'unexpose', 'stop', 'continueVm', 'transferState', 'release'],
  ...['nativeMigrate', 'nativeProgress', 'nativeCancel', 'sourceCounters'],
  ...['prepare', 'connect', 'awaitLoaded', 'resume', 'progress', 'reconnect', 'inherit', 'finish', 'discard'],
];

const OF_ROOT_ITSELF: ReadonlySet<string> = new Set(['armParent', 'forkPoint', 'sendForkState', 'commitFork']);

let directory: string;
let authority: Authority;
const at = (name: string): string => join(directory, name);

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-hosts-'));
  authority = await Authority.create(at('ca'), 'test');
  for (const name of ['A', 'B', 'C']) await authority.issue({ role: 'host', name }, ['127.0.0.1'], at(name));
  await authority.issue({ role: 'user', name: 'alice', userRole: 'operator' }, [], at('alice'));
});
afterAll(() => rm(directory, { recursive: true, force: true }));

/** Host A serves and knows B. `services` records the incoming calls. */
let services: FakeServices;
let server: ApiServer;
let port: number;
const closers: (() => unknown)[] = [];

beforeEach(async () => {
  const store = new TlsStore(at('A'), () => undefined);
  services = fakeServices({ tls: store });
  server = buildServer(services);
  port = await server.listenTls('127.0.0.1', 0, store);
  closers.push(
    () => server.close(),
    () => store.close(),
  );
});
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

/** Host `self`'s view of the other hosts. */
function remote(self: string, peers: Record<string, string>, local?: HostPort): RemoteAgents {
  const store = new TlsStore(at(self), () => undefined);
  const agents = new RemoteAgents({
    self,
    store,
    peers,
    local: () => local as ReturnType<ConstructorParameters<typeof RemoteAgents>[0]['local']>,
  });
  closers.push(
    () => store.close(),
    () => agents.close(),
  );
  return agents;
}

const url = (): string => `https://127.0.0.1:${port}`;

describe('calls', () => {
  test('of every method arrive with their arguments, or are refused for them', async () => {
    const agent = remote('B', { A: url() }).agent('A');
    for (const call of HOST_CALLS) {
      const answered = callOn(agent, call, ['garbage', { x: 1 }, 3, 4]);
      await expect(answered, call.name).rejects.toMatchObject({ code: 'USAGE' });
    }
    expect(services.calls).toEqual([]);
    services.answers.set('resume', () => ({ resumedAtUs: 17 }));
    expect(await agent.target.resume(SESSION, 4)).toEqual({ resumedAtUs: 17 });
    expect(await agent.target.finish(SESSION)).toBeUndefined();
    expect(services.calls).toEqual([
      { method: 'resume', args: [SESSION, 4] },
      { method: 'finish', args: [SESSION] },
    ]);
  });

  test('have the paths that previous builds call, each its own', () => {
    const names = HOST_CALLS.map(({ name }) => name);
    expect(new Set(names).size).toBe(names.length);
    expect(names).toEqual(expect.arrayContaining(CALLS_OF_PREVIOUS_BUILDS));
    expect(callPath('vmInventory')).toBe('/agent/v1/call/vmInventory');
    expect(statePath(SESSION)).toBe(`/agent/v1/sessions/${SESSION}/state`);
  });

  test('of a host that reads an image as another one are refused', async () => {
    const { forks, fanout } = remote('B', { A: url() }).agent('A');
    const calls = [
      ...[fanout.serveHeld(IMAGE, 'C', 'tcp'), fanout.joinMulticast(IMAGE, 'C', 'udp', 0)],
      ...[fanout.digestsHash(IMAGE, 'C', 0, 0), fanout.touchOrder(IMAGE, 'C')],
      ...[forks.serveImage(IMAGE, 'C', 'tcp'), forks.imageDigests(IMAGE, 'C', 0, 0), forks.endImage(IMAGE, 'A')],
    ];
    for (const reading of calls) {
      await expect(reading).rejects.toMatchObject({ code: 'NOT_PERMITTED' });
    }
    expect(services.calls).toEqual([]);
  });

  test('of forks bring there and back all that the engine needs', async () => {
    const { forks } = remote('B', { A: url() }).agent('A');
    const { isPartialAllowed, fanout: _, topology: _t, hosts: _h, ...asked } = forkRequest;
    for (const [name, answer] of Object.entries(forkAnswers)) services.answers.set(name, () => answer);
    const error = new MigrationError('QEMU_FAILED', 'no', { remedy: 'look' });
    services.answers.set('runClones', () => ({ ready: [], failures: [{ index: 0, name: 'vm1-0', error }] }));
    const { spec } = forkInventory.vm;
    const place = { host: 'B', image: IMAGE, spec, allocatedBytes: 2 ** 28 };
    const origin = { ...place, accel: 'tcg', qemuVersion: '7.2.22' } as const;
    const question = { ...asked, origin };
    expect(await forks.forkInventory(question)).toEqual(forkAnswers.forkInventory);
    const prepare = { ...question, vm: null, isPartialAllowed, fork: IMAGE, job: 'job-1', hosts: ['A', 'B'] };
    expect(await forks.prepareClones(prepare)).toEqual(forkAnswers.prepareClones);
    expect(await forks.serveImage(IMAGE, 'B', 'tcp')).toEqual(forkAnswers.serveImage);
    expect(await forks.imageDigests(IMAGE, 'B', 0, 0)).toEqual(forkAnswers.imageDigests);
    await forks.endImage(IMAGE, 'B');
    await forks.connectImage(IMAGE, 'tcp');
    await forks.completeImage(IMAGE);
    expect(await forks.loadClones(IMAGE)).toEqual(forkAnswers.loadClones);
    const { failures } = await forks.runClones(IMAGE, 'committed');
    expect(MigrationError.fromJSON(failures[0]?.error, 'A')).toMatchObject({ code: 'QEMU_FAILED', remedy: 'look' });
    expect(await forks.forkProgress(IMAGE)).toEqual(forkAnswers.forkProgress);
    await forks.finishFork(IMAGE);
    expect(await forks.forkDecision(IMAGE)).toEqual(forkAnswers.forkDecision);
    await forks.discardFork(IMAGE);
    expect(services.calls.map(({ method }) => method)).toEqual(
      Object.keys(forkAnswers).filter((name) => !OF_ROOT_ITSELF.has(name)),
    );
    expect(services.calls[1]?.args).toEqual([prepare]);
    expect(services.calls.find(({ method }) => method === 'runClones')?.args).toEqual([IMAGE, 'committed']);
  });

  test.each(['../../etc', 'A'.repeat(16), ''])('of a fork called "%s" are refused', async (fork) => {
    const { forks } = remote('B', { A: url() }).agent('A');
    await expect(forks.discardFork(fork)).rejects.toMatchObject({ code: 'USAGE' });
    expect(services.calls).toEqual([]);
  });

  test('that fail bring the other side’s error, code and all', async () => {
    services.answers.set('finish', () => {
      throw new MigrationError('VM_BUSY', 'part of job-7', { remedy: 'wait', details: { job: 'job-7' } });
    });
    const failed = remote('B', { A: url() }).agent('A').target.finish(SESSION);
    await expect(failed).rejects.toMatchObject({
      code: 'VM_BUSY',
      remedy: 'wait',
      details: { job: 'job-7' },
      isRetryable: false,
    });
  });

  test.each([
    ['another shape', { resumedAtUs: 'soon' }],
    ['nothing', undefined],
    ['an absurd number', { resumedAtUs: -1 }],
  ])('that are answered with %s are a protocol error', async (_, answer) => {
    services.answers.set('resume', () => answer);
    const agent = remote('B', { A: url() }).agent('A');
    await expect(agent.target.resume(SESSION, 1)).rejects.toMatchObject({ code: 'PEER_PROTOCOL' });
  });

  test('to our own name do not leave the process', async () => {
    const own = { host: 'B' } as HostPort;
    expect(remote('B', { A: url() }, own).agent('B')).toBe(own);
  });

  test('to a host that nobody named are NOT_FOUND', () => {
    expect(() => remote('B', { A: url() }).agent('D')).toThrow(expect.objectContaining({ code: 'NOT_FOUND' }));
  });
});

describe('who may call', () => {
  async function status(
    folder: string,
    path: string,
    method = path.startsWith('/agent') ? 'POST' : 'GET',
  ): Promise<number | string> {
    const { ca, cert, key } = new TlsStore(at(folder), () => undefined).options();
    return new Promise((resolve) => {
      const options = {
        method,
        agent: false as const,
        checkServerIdentity: () => undefined,
      };
      const request = httpsRequest(`${url()}${path}`, { ...options, ca, cert, key }, (response) => {
        response.resume();
        resolve(response.statusCode ?? 0);
      });
      request.on('error', (error: NodeJS.ErrnoException) => resolve(error.code ?? 'error'));
      request.end();
    });
  }

  test('hosts’ routes: known hosts; clients’ routes: hosts and users', async () => {
    expect(await status('B', PING_PATH)).toBe(200);
    expect(await status('C', PING_PATH)).toBe(403); // a host of the cluster, but not a peer of A
    expect(await status('alice', PING_PATH)).toBe(403);
    for (const { name } of HOST_CALLS) {
      expect(await status('alice', callPath(name)), name).toBe(403);
      expect(await status('C', callPath(name)), name).toBe(403);
    }
    expect(await status('alice', statePath(SESSION), 'PUT')).toBe(403);
    for (const caller of ['alice', 'C']) expect(await status(caller, serialPath('web'), 'GET')).toBe(403);
    expect(await status('B', '/v1/vms')).toBe(200);
    expect(await status('alice', '/v1/vms')).toBe(200);
    expect(services.calls).toEqual([]);
  });

  test('a path that only looks like a client’s route does not get around it', async () => {
    expect(await status('alice', '/%61gent/v1/ping')).not.toBe(200);
    expect(await status('alice', '//agent/v1/ping')).not.toBe(200);
    expect(await status('alice', '/v1/../agent/v1/ping')).not.toBe(200);
  });

  test('our commands come in over https with a user’s certificate', async () => {
    const client = new ApiClient({ host: url(), tls: at('alice') });
    expect(await client.get('/v1/vms')).toEqual([]);
    expect(() => new ApiClient({ host: url(), tls: null })).toThrow(expect.objectContaining({ code: 'USAGE' }));
  });

  test('a host whose certificate is revoked is cut off, its open connections too', async () => {
    await authority.issue({ role: 'host', name: 'B' }, [], at('B-lost'));
    const lost = remote('B', { A: url() });
    await lost.warm('A');
    await authority.revoke('B');
    await authority.copyRevocations(at('A'));
    await expect
      .poll(() => services.logged.map(({ message }) => message), { timeout: 20_000 })
      .toContain('loaded new certificates or a new revocation list');
    await expect(lost.ping('A')).rejects.toMatchObject({ code: expect.stringMatching(/UNAUTHENTICATED|UNREACHABLE/) });
    expect(services.logged.map(({ message }) => message)).toContain('refused a connection');
    await authority.issue({ role: 'host', name: 'B' }, ['127.0.0.1'], at('B')); // for the tests that follow
  });
});

describe('whom we call', () => {
  test('a host of which only small packets come through is told from one that is away', async () => {
    const silent = createServer((socket) => socket.on('error', () => undefined).resume());
    await new Promise<void>((resolve) => silent.listen(0, '127.0.0.1', resolve));
    closers.push(() => silent.close());
    const { port: open } = silent.address() as AddressInfo;
    await expect(remote('B', { C: `https://127.0.0.1:${open}` }).ping('C')).rejects.toMatchObject({
      code: 'UNREACHABLE',
      message: expect.stringContaining('does not answer a TLS handshake') as string,
      remedy: expect.stringContaining('MTU') as string,
    });
  });

  test('a host that shows another host’s certificate is refused before anything is sent', async () => {
    const agents = remote('B', { C: url() }); // A listens there
    await expect(agents.agent('C').inventory.inventory()).rejects.toMatchObject({ code: 'UNAUTHENTICATED' });
    expect(services.calls).toEqual([]);
  });

  test('nobody there is UNREACHABLE and worth another try', async () => {
    await server.close();
    const failed = remote('B', { A: url() }).agent('A').inventory.inventory();
    await expect(failed).rejects.toMatchObject({ code: 'UNREACHABLE', isRetryable: true });
  });

  test('somebody who speaks no TLS is an error, not a wait', async () => {
    const other = createServer((socket) => socket.end('hello\r\n'));
    await new Promise<void>((resolve) => other.listen(0, '127.0.0.1', resolve));
    closers.push(() => other.close());
    const agents = remote('B', { A: `https://127.0.0.1:${(other.address() as AddressInfo).port}` });
    await expect(agents.ping('A')).rejects.toMatchObject({
      code: expect.stringMatching(/UNAUTHENTICATED|UNREACHABLE/),
    });
  });

  test.each([
    ['not JSON', 200, 'hello'],
    ['no result', 200, '{"x": 1}'],
    ['an error that is none of ours', 500, '{"code": "HAHA", "message": "x"}'],
    ['too much', 200, `{"result": "${'x'.repeat(5 * 2 ** 20)}"}`],
  ])('a peer that answers %s is a protocol error', async (_, status, text) => {
    const store = new TlsStore(at('A'), () => undefined);
    const peer = createTlsServer(store.options(), (request, response) => {
      request.resume();
      response.writeHead(status).end(text);
    });
    await new Promise<void>((resolve) => peer.listen(0, '127.0.0.1', resolve));
    closers.push(
      () => store.close(),
      () => peer.closeAllConnections(),
      () => peer.close(),
    );
    const agents = remote('B', { A: `https://127.0.0.1:${(peer.address() as AddressInfo).port}` });
    await expect(agents.agent('A').inventory.inventory()).rejects.toMatchObject({ code: 'PEER_PROTOCOL' });
  });

  test('a connection that the peer closed while it was idle is made again', async () => {
    const agents = remote('B', { A: url() });
    await agents.warm('A');
    await server.close();
    server = buildServer(services);
    const store = new TlsStore(at('A'), () => undefined);
    closers.push(() => store.close());
    await server.listenTls('127.0.0.1', port, store);
    expect((await agents.ping('A')).roundTripMs).toBeGreaterThan(0);
  });
});

describe('the device state', () => {
  test('arrives whole', async () => {
    const bytes = Buffer.alloc(3 * 2 ** 20, 'state');
    await remote('B', { A: url() }).sendState('A', SESSION, Readable.from([bytes.subarray(0, 7), bytes.subarray(7)]));
    expect(services.states.get(SESSION)?.equals(bytes)).toBe(true);
    services.answers.set('loadClones', () => forkAnswers.loadClones);
    const loading = remote('B', { A: url() }).sendForkState('A', IMAGE, Readable.from([bytes]));
    expect(await loading).toEqual(forkAnswers.loadClones);
    expect(services.states.get(IMAGE)?.equals(bytes)).toBe(true);
  });

  test('that breaks off is never taken for a whole one', async () => {
    let outcome: unknown = 'pending';
    let seenBytes = 0;
    services.agent.target.acceptState = async (_, stream) => {
      outcome = await (async () => {
        for await (const chunk of stream as AsyncIterable<Buffer>) seenBytes += chunk.length;
      })().then(
        () => 'whole',
        (error: unknown) => error,
      );
    };
    const body = new Readable({ read: () => undefined });
    const sent = remote('B', { A: url() }).sendState('A', SESSION, body);
    body.push(Buffer.alloc(1000));
    await expect.poll(() => seenBytes, { timeout: 20_000 }).toBe(1000);
    body.destroy(new Error('QEMU died'));
    await expect(sent).rejects.toBeInstanceOf(MigrationError);
    await expect.poll(() => outcome, { timeout: 20_000 }).not.toBe('pending');
    expect(outcome).toBeInstanceOf(Error);
  });

  test('that never ends is cut off', async () => {
    let seenBytes = 0;
    services.agent.target.acceptState = async (_, stream) => {
      for await (const chunk of stream as AsyncIterable<Buffer>) seenBytes += chunk.length;
    };
    const piece = Buffer.alloc(1 << 20);
    const endless = new Readable({
      read() {
        this.push(piece);
      },
    });
    const sent = remote('B', { A: url() }).sendState('A', SESSION, endless);
    await expect(sent).rejects.toMatchObject({ code: expect.stringMatching(/PEER_PROTOCOL|UNREACHABLE/) });
    expect(seenBytes).toBeLessThanOrEqual(DEVICE_STATE_BYTES_MAX);
    await expect.poll(() => endless.destroyed, { timeout: 20_000 }).toBe(true);
  }, 60_000); // 256 MiB through TLS, on a machine that may be busy

  test('that the target refuses ends the stream at the source', async () => {
    services.agent.target.acceptState = async (_, stream) => {
      stream.destroy();
      throw new MigrationError('NOT_FOUND', 'no such session');
    };
    const body = new Readable({ read: () => undefined });
    body.push(Buffer.alloc(100));
    const closed = new Promise((resolve) => body.once('close', resolve));
    await expect(remote('B', { A: url() }).sendState('A', SESSION, body)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    await closed;
  });

  test('that the target refuses with much of it unread leaves a connection that later calls can use', async () => {
    const agents = remote('B', { A: url() });
    // More than the target accepts unread, less than the kernel's buffers hold: all of it has been sent.
    const body = Readable.from([Buffer.alloc(2 ** 19)]);
    const ended = new Promise((resolve) => body.once('close', resolve));
    services.agent.target.acceptState = async () => {
      await ended;
      for (let round = 0; round < 3; round++) await agents.ping('A');
      throw new MigrationError('QEMU_FAILED', 'QEMU has ended');
    };
    await expect(agents.sendState('A', SESSION, body)).rejects.toMatchObject({ code: 'QEMU_FAILED' });
    // As many calls as there are connections.
    await Promise.all([agents.ping('A'), agents.ping('A')]);
  }, 30_000);
});

/** Who may do what: every route of the API, for each role, by certificate, by token and on the unix socket. */
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { request as httpsRequest } from 'node:https';
import { connect as netConnect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { connect } from 'node:tls';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { ApiClient } from '../../../src/api/client.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { type Caller, USER_ROLES } from '../../../src/domain/caller.js';
import { toMigrationError } from '../../../src/domain/errors.js';
import type { VmView } from '../../../src/domain/vm.js';
import type { StoppedVms } from '../../../src/engine/ports/images.js';
import { Authority } from '../../../src/tls/authority.js';
import { TlsStore } from '../../../src/tls/store.js';
import { type FakeServices, fakeServices } from '../../support/api-fakes.js';

let directory: string;
let store: TlsStore;
let services: FakeServices;
let server: ApiServer;
let port: number;
let caller: Caller;
const at = (name: string): string => join(directory, name);

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-access-'));
  const authority = await Authority.create(at('ca'), 'test');
  for (const name of ['A', 'B']) await authority.issue({ role: 'host', name }, ['127.0.0.1'], at(name));
  for (const userRole of USER_ROLES)
    await authority.issue({ role: 'user', name: userRole, userRole }, [], at(userRole));
  await authority.issue({ role: 'user', name: 'unmarked' }, [], at('unmarked'));
});
afterAll(() => rm(directory, { recursive: true, force: true }));

beforeEach(async () => {
  store = new TlsStore(at('A'), () => undefined);
  caller = { name: 'local/0', role: 'admin', from: 'unix socket' };
  services = fakeServices({ tls: store, localCaller: () => caller });
  server = buildServer(services);
  await server.listenUnix(at('api.sock'));
  port = await server.listenTls('127.0.0.1', 0, store);
});
afterEach(async () => {
  await server.close();
  store.close();
});

const local = (): ApiClient => new ApiClient({ host: `unix:${at('api.sock')}`, tls: null });
const remote = (folder: string, token: string | null = null): ApiClient =>
  new ApiClient({ host: `https://127.0.0.1:${port}`, tls: at(folder), token });
const codeOf = (call: Promise<unknown>): Promise<string> =>
  call.then(
    () => 'ok',
    (error) => toMigrationError(error).code,
  );

/** Each public route, and the least role that it needs. What is new and missing here fails the test. */
const NEEDS: Readonly<Record<string, (typeof USER_ROLES)[number]>> = {
  'GET /metrics': 'viewer',
  'GET /openapi.json': 'viewer',
  'GET /v1/doctor': 'viewer',
  'GET /v1/events': 'viewer',
  'GET /v1/events/vms': 'viewer',
  'GET /v1/host': 'viewer',
  'GET /v1/hosts': 'viewer',
  'GET /v1/images': 'viewer',
  'GET /v1/images/:id': 'viewer',
  'GET /v1/images/:id/clones': 'viewer',
  'GET /v1/jobs': 'viewer',
  'GET /v1/jobs/:id': 'viewer',
  'GET /v1/jobs/:id/events': 'viewer',
  'GET /v1/pool': 'viewer',
  'GET /v1/vms': 'viewer',
  'GET /v1/vms/:name': 'viewer',
  'GET /v1/vms/:name/serial': 'viewer',
  'GET /v1/whoami': 'viewer',
  'DELETE /v1/images/:id': 'operator',
  'POST /v1/clones/stop': 'operator',
  'POST /v1/forks': 'operator',
  'POST /v1/images/:id/fetch': 'operator',
  'POST /v1/images/:id/save': 'operator',
  'POST /v1/images/:id/stop': 'operator',
  'POST /v1/images/load': 'admin',
  'POST /v1/images/prune': 'operator',
  'POST /v1/jobs/:id/cancel': 'operator',
  'POST /v1/jobs/:id/recover': 'operator',
  'POST /v1/migrations': 'operator',
  'POST /v1/pool': 'operator',
  'POST /v1/pool/drain': 'operator',
  'POST /v1/vms': 'operator',
  'POST /v1/vms/:name/flatten': 'operator',
  'POST /v1/vms/:name/pause': 'operator',
  'POST /v1/vms/:name/reset': 'operator',
  'POST /v1/vms/:name/resume': 'operator',
  'POST /v1/vms/:name/stop': 'operator',
  'DELETE /v1/tokens/:name': 'admin',
  'GET /v1/tokens': 'admin',
  'POST /v1/tokens': 'admin',
};

describe('every route', () => {
  const routes = (): string[] => {
    const found: string[] = [];
    // The tree of routes: one line a path segment, with its methods behind the last one.
    const tree = server.app.printRoutes({ commonPrefix: false });
    const parts: string[] = [];
    for (const line of tree.split('\n')) {
      const [, indent = '', text = ''] = /^([│\s]*)[├└]── (.*)$/.exec(line) ?? [];
      if (text === '') continue;
      const depth = indent.length / 4;
      const [, segment = '', methods = ''] = /^(.*?)(?: \(([A-Z, ]+)\))?$/.exec(text) ?? [];
      parts.splice(depth, parts.length, segment);
      for (const method of methods === '' ? [] : methods.split(', ')) found.push(`${method} ${parts.join('')}`);
    }
    return found.filter((route) => !route.includes('/agent/'));
  };

  test('has its role in the table', () => {
    expect(routes().sort()).toEqual(Object.keys(NEEDS).sort());
  });

  test.each(USER_ROLES)('is refused to a %s who may not use it, and to no one else', async (role) => {
    const allowed = USER_ROLES.slice(0, USER_ROLES.indexOf(role) + 1);
    for (const [route, needed] of Object.entries(NEEDS)) {
      const [method = 'GET', path = ''] = route.split(' ');
      if (path.includes('/events')) continue;
      const url = path.replace(':name', 'nobody').replace(':id', '0'.repeat(16));
      caller = { name: 'local/1000', role, from: 'unix socket' };
      const answer = await server.app.inject({ method: method as 'GET', url });
      const isRefused = answer.statusCode === 403 && answer.body.includes('needs the role');
      expect(isRefused, `${route} as ${role}: ${answer.body.slice(0, 200)}`).toBe(!allowed.includes(needed));
    }
  });
});

describe('the role', () => {
  test('of a user is what the certificate says, and without a word of it a user may only look', async () => {
    for (const role of USER_ROLES)
      expect(await remote(role).get('/v1/whoami')).toMatchObject({ name: `user/${role}`, role, from: '127.0.0.1' });
    expect(await remote('unmarked').get('/v1/whoami')).toMatchObject({ role: 'viewer' });
    expect(await codeOf(remote('unmarked').post('/v1/vms/web/stop', { force: true }))).toBe('NOT_PERMITTED');
  });

  test('of a host lets it look at what clients see, and change nothing', async () => {
    expect(await remote('B').get('/v1/vms')).toEqual([]);
    expect(await codeOf(remote('B').post('/v1/vms', { name: 'web', memory: { size: '64M' } }))).toBe('NOT_PERMITTED');
  });

  test('decides what a spec may name', async () => {
    const spec = { name: 'web', memory: { size: '64M' }, qemuArgs: ['-chardev', 'file,id=x,path=/etc/cron.d/x'] };
    expect(await codeOf(remote('operator').post('/v1/vms', spec))).toBe('NOT_PERMITTED');
    const save = { path: '/etc/cron.d/x' };
    expect(await codeOf(remote('operator').post(`/v1/images/${'0'.repeat(16)}/save`, save))).toBe('NOT_PERMITTED');
    expect(await codeOf(remote('admin').post('/v1/vms', spec))).toBe('ok');
  });
});

describe('a token', () => {
  test('is a way in without a certificate, for what its role allows, until it is revoked', async () => {
    await local().post('/v1/tokens', { name: 'ci', role: 'operator', expiresInMs: 60_000 });
    const client = remote('ca', 'token-ci');
    expect(await client.get('/v1/whoami')).toMatchObject({ name: 'token/ci', role: 'operator' });
    expect(await codeOf(client.get('/v1/tokens'))).toBe('NOT_PERMITTED');
    expect(await codeOf(remote('ca', 'token-other').get('/v1/vms'))).toBe('UNAUTHENTICATED');
    await local().post('/v1/tokens', { name: 'second', role: 'viewer', expiresInMs: 60_000 });
    await local().delete('/v1/tokens/ci');
    expect(await codeOf(client.get('/v1/vms'))).toBe('UNAUTHENTICATED');
  });

  test('that is revoked ends what its client follows', async () => {
    await local().post('/v1/tokens', { name: 'ci', role: 'viewer', expiresInMs: 60_000 });
    let isOpen = false;
    const following = remote('ca', 'token-ci').followVms(undefined, () => undefined, { onOpen: () => (isOpen = true) });
    const ended = codeOf(following);
    await expect.poll(() => isOpen).toBe(true);
    await local().delete('/v1/tokens/ci');
    expect(await ended).toBe('UNREACHABLE');
  });

  test('makes no host: calls between hosts need a certificate', async () => {
    await local().post('/v1/tokens', { name: 'host', role: 'admin', expiresInMs: 60_000 });
    expect(await codeOf(remote('ca', 'token-host').post('/agent/v1/ping', []))).toBe('NOT_PERMITTED');
  });

  test('is no way in on a host that has none', async () => {
    expect(await codeOf(remote('ca', 'token-ci').get('/v1/vms'))).toBe('UNREACHABLE');
    expect(services.logged.filter(({ message }) => message === 'refused a connection')).toHaveLength(1);
  });
});

describe('a certificate of another authority', () => {
  /** Returns the answer to a request, or null if there is none, and the TLS sessions that the server offers. */
  const ask = (folder: string | null, session?: Buffer) =>
    new Promise<{ answer: string | null; sessions: Buffer[] }>((resolve) => {
      const read = (name: string) => readFileSync(join(folder ?? '', name));
      const own = folder === null ? {} : { cert: read('cert.pem'), key: read('key.pem') };
      const sessions: Buffer[] = [];
      let answer: string | null = null;
      const socket = connect({
        ...{ host: '127.0.0.1', port, ca: readFileSync(at('A/ca.pem')), checkServerIdentity: () => undefined },
        ...{ ...own, ...(session === undefined ? {} : { session }) },
      });
      socket.on('session', (offered: Buffer) => sessions.push(offered));
      socket.on('data', (data: Buffer) => (answer = `${answer ?? ''}${data.toString()}`));
      socket.on('error', () => undefined);
      socket.once('close', () => resolve({ answer, sessions }));
      socket.write('GET /v1/whoami HTTP/1.1\r\nHost: A\r\nConnection: close\r\n\r\n');
    });

  beforeAll(async () => {
    const other = await Authority.create(at('other-ca'), 'test');
    await other.issue({ role: 'user', name: 'admin', userRole: 'admin' }, [], at('forged'));
  });

  test('gives no role, on a host with tokens neither, nor by the TLS session of an earlier attempt', async () => {
    for (const hasTokens of [false, true]) {
      if (hasTokens) await local().post('/v1/tokens', { name: 'ci', role: 'viewer', expiresInMs: 60_000 });
      const first = await ask(at('forged'));
      expect(first.answer).toBeNull();
      for (const session of first.sessions) {
        expect((await ask(at('forged'), session)).answer).toBeNull();
        expect((await ask(null, session)).answer ?? '').not.toContain('admin');
      }
    }
  });

  test('and no certificate at all gives none, by a session that was resumed neither', async () => {
    await local().post('/v1/tokens', { name: 'ci', role: 'viewer', expiresInMs: 60_000 });
    const first = await ask(null);
    expect(first.answer).toContain('401');
    expect(first.sessions).not.toEqual([]);
    for (const session of first.sessions) expect((await ask(null, session)).answer).toContain('401');
  });
});

describe('a page of another site', () => {
  test.each([
    { origin: 'https://evil.example' },
    { origin: 'null' },
    { 'sec-fetch-site': 'cross-site' },
    { 'sec-fetch-site': 'same-site' },
  ])('cannot use the certificate of a browser: %j', async (headers) => {
    services.vms.run = () => Promise.reject(new Error('reached'));
    for (const url of ['/v1/vms/web/stop', '/v1/vms/web/pause', '/v1/jobs/job-1/cancel']) {
      const answer = await server.app.inject({ method: 'POST', url, headers });
      expect(answer.statusCode, url).toBe(403);
    }
    expect(services.calls).toEqual([]);
  });
});

describe('the audit log', () => {
  test('has who, what, the object, from where and the result, of changing and of refused calls', async () => {
    await local().post('/v1/vms', { name: 'web', memory: { size: '64M' } });
    await local().get('/v1/vms');
    await codeOf(remote('viewer').post('/v1/vms/web/stop', { force: true }));
    await codeOf(remote('operator').post('/v1/vms/nobody/pause'));
    await codeOf(remote('operator').post('/agent/v1/ping', []));
    expect(services.audited).toMatchObject([
      { who: 'local/0', from: 'unix socket', what: 'POST /v1/vms', object: 'web', result: 'ok' },
      {
        who: 'user/viewer',
        from: '127.0.0.1',
        what: 'POST /v1/vms/:name/stop',
        object: 'web',
        result: 'NOT_PERMITTED',
      },
      { who: 'user/operator', what: 'POST /v1/vms/:name/pause', object: 'nobody', result: 'NOT_FOUND' },
      { who: 'user/operator', what: 'POST /agent/v1/ping', result: 'NOT_PERMITTED' },
    ]);
  });

  test('has the call of a client that hangs up before the answer', async () => {
    await local().post('/v1/vms', { name: 'web', memory: { size: '64M' } });
    let isReached = false;
    services.vms.pause = () => {
      isReached = true;
      return new Promise(() => undefined);
    };
    const [ca, cert, key] = ['ca.pem', 'cert.pem', 'key.pem'].map((name) => readFileSync(join(at('operator'), name)));
    const options = { ca, cert, key, method: 'POST', agent: false, checkServerIdentity: () => undefined };
    const request = httpsRequest(`https://127.0.0.1:${port}/v1/vms/web/pause`, options);
    request.on('error', () => undefined);
    request.end();
    await expect.poll(() => isReached).toBe(true);
    request.destroy();
    await expect
      .poll(() => services.audited.at(-1))
      .toMatchObject({
        ...{ who: 'user/operator', what: 'POST /v1/vms/:name/pause', object: 'web', result: 'unanswered' },
      });
  });

  test('has the consoles that were opened, and that were refused', async () => {
    await local().post('/v1/vms', { name: 'web', memory: { size: '64M' } });
    (await remote('operator').console('web', 0)).destroy();
    expect(await codeOf(remote('viewer').console('web', 0))).toBe('NOT_PERMITTED');
    (await remote('viewer').serialLog('web')).destroy();
    expect(services.audited.slice(1)).toMatchObject([
      { who: 'user/operator', what: 'GET /v1/vms/:name/console', object: 'web', result: 'ok' },
      { who: 'user/viewer', what: 'GET /v1/vms/:name/console', object: 'web', result: 'NOT_PERMITTED' },
    ]);
  });
});

describe('another host', () => {
  test('stops the clones that it shares, not the others, and the log has what was refused', async () => {
    const [shared, own] = ['1'.repeat(16), '2'.repeat(16)];
    for (const name of ['theirs', 'ours']) await local().post('/v1/vms', { name, memory: { size: '64M' } });
    services.ends('theirs', '', 0, shared);
    services.ends('ours', '', 0, own);
    services.ties.images.set(shared, ['B']).set(own, []);
    const clones = (await local().get<VmView[]>('/v1/vms')).map(({ name, uuid }) => ({ name, uuid }));
    const { result } = await remote('B').post<{ result: StoppedVms }>('/agent/v1/call/stopClones', [clones, true]);
    expect(result).toMatchObject({
      stopped: ['theirs'],
      failures: [{ name: 'ours', error: { code: 'NOT_PERMITTED' } }],
    });
    const refused = { who: 'host/B', what: 'stopClones', object: 'ours', result: 'NOT_PERMITTED' };
    expect(services.audited.slice(2)).toMatchObject([refused, { who: 'host/B', what: 'stopClones', result: 'ok' }]);
    const others = clones.filter(({ name }) => name === 'ours');
    expect(await codeOf(remote('B').post('/agent/v1/call/stopClones', [others, true]))).toBe('NOT_PERMITTED');
  });
});

describe('a user of the unix socket', () => {
  test('keeps nobody else out with silent connections', async () => {
    caller = { name: 'local/1000', role: 'operator', from: 'unix socket' };
    const mute = Array.from({ length: 60 }, () => netConnect(at('api.sock')));
    let endedCount = 0;
    for (const socket of mute) socket.once('close', () => endedCount++).on('error', () => undefined);
    await expect.poll(() => endedCount).toBe(12);
    caller = { name: 'local/0', role: 'admin', from: 'unix socket' };
    expect(await local().get('/v1/vms')).toEqual([]);
    for (const socket of mute) socket.destroy();
  });
});

describe('strangers', () => {
  test('cannot fill the log: it has some lines, and how many were left out', async () => {
    const ca = readFileSync(at('A/ca.pem'));
    const knock = () =>
      new Promise<void>((resolve) => {
        const options = { ca, agent: false, checkServerIdentity: () => undefined };
        const request = httpsRequest(`https://127.0.0.1:${port}/v1/vms`, options, (response) => response.resume());
        request.once('close', () => resolve());
        request.on('error', () => undefined);
        request.end();
      });
    const beganAtMs = performance.now();
    for (let round = 0; round < 12; round++) await Promise.all(Array.from({ length: 10 }, knock));
    const seconds = Math.ceil((performance.now() - beganAtMs) / 1000) + 1;
    const lines = services.logged.filter(({ message }) => message === 'refused a connection').length;
    expect(lines).toBeGreaterThan(0);
    expect(lines).toBeLessThanOrEqual(Math.min(119, 10 * seconds));
    expect((await server.app.inject({ method: 'GET', url: '/metrics' })).body).toContain(
      'vmigrate_connections_refused_total 120\n',
    );
  });
});

/** The API for clients: routes, errors, limits, events, the console. */
import { once } from 'node:events';
import { mkdtemp, rm, stat } from 'node:fs/promises';
import { createServer, connect as netConnect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { InjectOptions } from 'fastify';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { ApiClient, DaemonUnreachable } from '../../../src/api/client.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import type { JobView } from '../../../src/domain/job.js';
import { type FakeServices, fakeServices, jobView, REPORT, vmView } from '../../support/api-fakes.js';

let services: FakeServices;
let server: ApiServer;
let directory: string;
let socketPath: string;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-api-'));
  socketPath = join(directory, 'api.sock');
  services = fakeServices();
  server = buildServer(services);
  await server.listenUnix(socketPath);
});

afterEach(async () => {
  await server.close();
  await rm(directory, { recursive: true, force: true });
});

const client = (): ApiClient => new ApiClient({ host: `unix:${socketPath}`, tls: null });
const SPEC = { name: 'web', memory: { size: '256M' } };

async function inject(options: InjectOptions): Promise<{ status: number; body: Record<string, unknown> }> {
  const answer = await server.app.inject(options);
  return { status: answer.statusCode, body: answer.json() };
}

/** Sends raw bytes, without an HTTP library in between. */
async function raw(text: string | Buffer, isHalfOpen = false): Promise<string> {
  const socket = netConnect({ path: socketPath, allowHalfOpen: true });
  let answer = '';
  socket.on('data', (data: Buffer) => (answer += data.toString()));
  socket.on('error', () => undefined);
  if (isHalfOpen) socket.write(text);
  else socket.end(text);
  await Promise.race([once(socket, 'close'), once(socket, 'end'), new Promise((resolve) => setTimeout(resolve, 500))]);
  socket.destroy();
  return answer;
}

describe('VMs', () => {
  test('are started, listed, paused, resumed and stopped', async () => {
    const api = client();
    expect(await api.post('/v1/vms', SPEC)).toMatchObject({ name: 'web', state: 'running' });
    expect(await api.postText('/v1/vms', 'name: yaml\nmemory: {size: 64M}\n')).toMatchObject({ name: 'yaml' });
    expect(await api.get<unknown[]>('/v1/vms')).toHaveLength(2);
    expect(await api.post('/v1/vms/web/pause')).toMatchObject({ state: 'paused' });
    expect(await api.post('/v1/vms/web/resume')).toMatchObject({ state: 'running' });
    expect(await api.post('/v1/vms/web/reset')).toMatchObject({ state: 'running' });
    expect(await api.post('/v1/vms/web/stop')).toMatchObject({ name: 'web', how: 'shutDown', exitCode: 0 });
    await expect(api.get('/v1/vms/web')).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  test('with an unknown key are refused, and the key is named', async () => {
    const { status, body } = await inject({ method: 'POST', url: '/v1/vms', payload: { ...SPEC, memroy: {} } });
    expect(status).toBe(422);
    expect(body).toMatchObject({ code: 'SPEC_INVALID', message: expect.stringContaining('memroy') });
  });
});

describe('every failure is an error with a code', () => {
  const cases: [string, InjectOptions, number, string][] = [
    ['no such route', { method: 'GET', url: '/v2/vms' }, 404, 'NOT_FOUND'],
    ['wrong method', { method: 'DELETE', url: '/v1/vms/web' }, 404, 'NOT_FOUND'],
    ['no such VM', { method: 'GET', url: '/v1/vms/none' }, 404, 'NOT_FOUND'],
    ['a name that is a path', { method: 'GET', url: '/v1/vms/..%2f..%2fetc' }, 400, 'USAGE'],
    ['a broken escape', { method: 'GET', url: '/v1/vms/%zz' }, 400, 'USAGE'],
    ['no such job', { method: 'POST', url: '/v1/jobs/job-99/cancel' }, 404, 'NOT_FOUND'],
    ['no such job’s events', { method: 'GET', url: '/v1/jobs/job-99/events' }, 404, 'NOT_FOUND'],
    [
      'an unknown key',
      { method: 'POST', url: '/v1/migrations', payload: { vm: 'a', target: 'B', sped: 1 } },
      400,
      'USAGE',
    ],
    ['a missing key', { method: 'POST', url: '/v1/migrations', payload: { vm: 'a' } }, 400, 'USAGE'],
    [
      'an impossible mode',
      { method: 'POST', url: '/v1/migrations', payload: { vm: 'a', target: 'B', mode: 'stop-and-copy' } },
      400,
      'USAGE',
    ],
    [
      'an absurd size',
      { method: 'POST', url: '/v1/migrations', payload: { vm: 'a', target: 'B', bandwidthBytesPerS: 1e300 } },
      400,
      'USAGE',
    ],
    ['no body', { method: 'POST', url: '/v1/migrations' }, 400, 'USAGE'],
    ['an unknown key of stop', { method: 'POST', url: '/v1/vms/web/stop', payload: { forec: true } }, 400, 'USAGE'],
    [
      'a body that is not JSON',
      { method: 'POST', url: '/v1/migrations', payload: '{"vm":', headers: { 'content-type': 'application/json' } },
      400,
      'USAGE',
    ],
    [
      'a poisoned prototype',
      {
        method: 'POST',
        url: '/v1/migrations',
        payload: '{"__proto__": {"x": 1}}',
        headers: { 'content-type': 'application/json' },
      },
      400,
      'USAGE',
    ],
    [
      'a media type we do not know',
      { method: 'POST', url: '/v1/vms', payload: 'x', headers: { 'content-type': 'text/xml' } },
      415,
      'USAGE',
    ],
    [
      'a body that is too large',
      { method: 'POST', url: '/v1/vms', payload: { name: 'x'.repeat(2 ** 20) } },
      413,
      'USAGE',
    ],
    ['a host’s call on the unix socket', { method: 'POST', url: '/agent/v1/ping' }, 403, 'NOT_PERMITTED'],
    [
      'a device state on the unix socket',
      {
        method: 'PUT',
        url: `/agent/v1/sessions/${'a'.repeat(32)}/state`,
        payload: 'x',
        headers: { 'content-type': 'application/octet-stream' },
      },
      403,
      'NOT_PERMITTED',
    ],
    [
      'octets for a client’s route',
      { method: 'POST', url: '/v1/vms', payload: 'x', headers: { 'content-type': 'application/octet-stream' } },
      400,
      'USAGE',
    ],
  ];
  test.each(cases)('%s', async (_, options, status, code) => {
    const answer = await inject(options);
    expect(answer).toMatchObject({ status, body: { code, message: expect.stringMatching(/./) } });
    expect(services.calls).toEqual([]);
    expect(services.jobs.requests).toEqual([]);
  });

  test('an unexpected exception is INTERNAL, logged, and shows no stack', async () => {
    services.jobs.list = () => {
      throw new TypeError('boom');
    };
    const { status, body } = await inject({ method: 'GET', url: '/v1/jobs' });
    expect(status).toBe(500);
    expect(body.code).toBe('INTERNAL');
    expect(JSON.stringify(body)).not.toContain('.ts:');
    expect(services.logged).toContainEqual({ level: 'error', message: 'internal error: a bug in vmigrated' });
  });
});

describe('hostile bytes', () => {
  test.each([
    ['garbage', '\x00\x01\x02\x03\r\n\r\n'],
    [
      'a truncated body',
      'POST /v1/migrations HTTP/1.1\r\nHost: x\r\n' +
        'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"vm": "a"',
    ],
    [
      'two lengths',
      'POST /v1/migrations HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}',
    ],
    ['an endless header', `GET /v1/vms HTTP/1.1\r\nX: ${'a'.repeat(100_000)}\r\n\r\n`],
    ['an endless address', `GET /v1/vms/${'a'.repeat(100_000)} HTTP/1.1\r\nHost: x\r\n\r\n`],
  ])('%s leaves the server serving', async (_, bytes) => {
    expect(await raw(bytes)).not.toMatch(/^HTTP\/1.1 2/);
    expect(await client().get('/v1/vms')).toEqual([]);
    expect(services.jobs.requests).toEqual([]);
  });
});

describe('migrations', () => {
  test('are submitted with defaults filled in', async () => {
    const job = await client().post<JobView>('/v1/migrations', { vm: 'web', target: 'B' });
    expect(job.id).toBe('job-1');
    expect(services.jobs.requests).toEqual([
      {
        ...{ vm: 'web', target: 'B', mode: 'postcopy', transport: 'auto', bandwidthBytesPerS: 0, downtimeMsMax: 300 },
        sharedStorage: 'prove',
      },
    ]);
    expect(await client().get<JobView[]>('/v1/jobs')).toHaveLength(1);
    expect(await client().post<JobView>('/v1/jobs/job-1/recover')).toMatchObject({ state: 'recovering' });
    expect(await client().post<JobView>('/v1/jobs/job-1/cancel')).toMatchObject({ state: 'cancelled' });
  });

  test('that pre-flight refuses say why', async () => {
    services.jobs.refusals = [{ code: 'RAM_NOT_SHARED', reason: 'private', remedy: 'use --native' }];
    const submitted = client().post('/v1/migrations', { vm: 'web', target: 'B' });
    await expect(submitted).rejects.toMatchObject({ code: 'PREFLIGHT_REFUSED', details: services.jobs.refusals });
    const shown = await client().post('/v1/migrations', { vm: 'web', target: 'B', dryRun: true });
    expect(shown).toEqual({ plan: null, refusals: services.jobs.refusals });
  });
});

describe('the console', () => {
  test('carries the line both ways', async () => {
    await client().post('/v1/vms', SPEC);
    const line = await client().console('web', 0);
    line.write('hello\n');
    const [data] = (await once(line, 'data')) as [Buffer];
    expect(data.toString()).toBe('hello\n');
    services.consoles.get('web')?.destroy(); // the VM ends
    await once(line, 'close');
  });

  test('is refused for a VM that is not there, and for other upgrades', async () => {
    await expect(client().console('none', 0)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    const other = await raw(
      'GET /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n',
      true,
    );
    expect(other).toMatch(/^HTTP\/1.1 404 /);
    expect(other).toContain('"code":"NOT_FOUND"');
  });
});

test('metrics count each ended job once', async () => {
  services.jobs.views.set('job-1', jobView('job-1'));
  services.jobs.change('job-1', { state: 'done', report: REPORT });
  services.jobs.change('job-1', { state: 'done', report: REPORT });
  const { body } = await server.app.inject({ method: 'GET', url: '/metrics' });
  expect(body).toContain('vmigrate_jobs_ended_total{state="done"} 1\n');
  expect(body).toContain(`vmigrate_bytes_total{kind="prefetch"} ${REPORT.bytes.prefetch}\n`);
  expect(body).toContain('vmigrate_faults_total 10\n');
  expect(body).toMatch(/^# HELP vmigrate_jobs .*\n# TYPE vmigrate_jobs gauge$/m);
});

test('metrics leave the jobs of other hosts to their coordinators, and show the VMs that lack memory', async () => {
  services.jobs.views.set('job-1', jobView('job-1', { coordinator: 'B' }));
  services.jobs.change('job-1', { state: 'done', report: REPORT });
  const since = new Date(Date.now() - 60_000).toISOString();
  const arriving = { source: 'B', job: 'job-1', percent: 41, isStalled: true, incompleteSince: since };
  services.vms.list = () => [vmView('web', { arriving }), vmView('other')];
  const { body } = await server.app.inject({ method: 'GET', url: '/metrics' });
  expect(body).toContain('vmigrate_jobs_ended_total{state="done"} 0\n');
  expect(body).toContain('vmigrate_jobs{state="done"} 0\n');
  expect(body).toMatch(/^vmigrate_vm_incomplete_seconds\{vm="web",source="B"\} (?:6\d|[7-9]\d|\d{3,})/m);
  expect(body).toContain('vmigrate_vm_stalled{vm="web",source="B"} 1\n');
  expect(body).not.toContain('vm="other"');
});

test('the OpenAPI document describes every route', async () => {
  const document = await client().get<{
    openapi: string;
    paths: Record<string, Record<string, unknown>>;
    components: { schemas: Record<string, { properties: unknown }> };
  }>('/openapi.json');
  expect(document.openapi).toMatch(/^3\.1/);
  expect(Object.keys(document.paths)).toEqual(
    expect.arrayContaining(['/v1/vms/{name}/pause', '/v1/migrations', '/agent/v1/call/prepare', '/metrics']),
  );
  const body = JSON.stringify(document.paths['/v1/migrations']);
  for (const key of ['bandwidthBytesPerS', 'downtimeMsMax', 'native-postcopy', 'refusals']) expect(body).toContain(key);
  expect(body).toContain('"#/components/schemas/Error"');
  const { properties } = document.components.schemas['Error'] ?? {};
  expect(properties).toMatchObject({ code: {}, cause: { properties: { remedy: {}, cause: { properties: {} } } } });
});

describe('the unix socket', () => {
  test('is its owner’s alone', async () => {
    expect((await stat(socketPath)).mode & 0o777).toBe(0o600);
  });

  test('is not taken from a daemon that answers, but from a dead one', async () => {
    const second = buildServer(fakeServices());
    await expect(second.listenUnix(socketPath)).rejects.toMatchObject({ code: 'CONFLICT' });
    const stale = join(directory, 'stale.sock');
    // A child that is killed leaves its socket file, as a killed daemon does.
    const { spawnSync } = await import('node:child_process');
    const listening = "() => process.kill(process.pid, 'SIGKILL')";
    const script = `require('node:net').createServer().listen(${JSON.stringify(stale)}, ${listening})`;
    spawnSync(process.execPath, ['-e', script]);
    expect((await stat(stale)).isSocket()).toBe(true);
    await second.listenUnix(stale);
    await second.close();
  });

  test('nobody there is DaemonUnreachable; somebody else there is a protocol error', async () => {
    const nobody = new ApiClient({ host: `unix:${directory}/none.sock`, tls: null });
    await expect(nobody.get('/v1/vms')).rejects.toBeInstanceOf(DaemonUnreachable);
    const other = createServer((socket) => socket.end('HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello'));
    const path = join(directory, 'other.sock');
    await new Promise<void>((resolve) => other.listen(path, resolve));
    const wrong = new ApiClient({ host: `unix:${path}`, tls: null });
    await expect(wrong.get('/v1/vms')).rejects.toMatchObject({ code: 'PEER_PROTOCOL' });
    other.close();
  });
});

/** Event streams, and a client whose daemon is silent. */
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, connect as netConnect, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text as readAll } from 'node:stream/consumers';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { ApiClient } from '../../../src/api/client.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { followJob } from '../../../src/cli/follow.js';
import { type FakeServices, fakeServices, jobView, REPORT, vmEvent } from '../../support/api-fakes.js';

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

describe('events', () => {
  test('of a job come until it has ended, the last one always', async () => {
    services.jobs.views.set('job-1', jobView('job-1'));
    const seen: string[] = [];
    const following = client().followJob('job-1', (view) => {
      seen.push(view.state);
      return false;
    });
    while (services.jobs.listeners.size < 2) await new Promise((resolve) => setTimeout(resolve, 5));
    for (let pages = 0; pages < 5000; pages++)
      services.jobs.change('job-1', {
        progress: { pagesTotal: 5000, pagesDone: pages, bytesDone: 0, bytesPerS: 0, secondsLeft: null, faultCount: 0 },
      });
    services.jobs.change('job-1', { state: 'done', report: REPORT });
    await following;
    expect(seen.at(-1)).toBe('done');
    expect(seen.length).toBeLessThan(20);
    expect(services.jobs.listeners.size).toBe(1); // that of the counters; the test's own has ended
  });

  test('of a job are asked for now and then where no more streams may be open', async () => {
    services.jobs.views.set('job-1', jobView('job-1'));
    const sockets = Array.from({ length: 256 }, () => netConnect(socketPath));
    for (const socket of sockets) {
      socket.write('GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n');
      await once(socket, 'data');
    }
    const refused = client().followJob('job-1', () => false);
    await expect(refused).rejects.toMatchObject({ code: 'CONFLICT', remedy: expect.stringContaining('follow') });
    const seen: string[] = [];
    const following = followJob(client(), 'job-1', ({ state }) => void seen.push(state));
    await expect.poll(() => seen.length).toBeGreaterThan(0);
    services.jobs.change('job-1', { state: 'done', report: REPORT });
    expect(await following).toMatchObject({ state: 'done' });
    for (const socket of sockets) socket.destroy();
  });

  test('of VMs come as they happen, and a reader goes on after the last one that it has seen', async () => {
    const exit = { at: '2030-01-01T00:00:00Z', reason: 'panicked', code: 0, signal: null, exitCode: null };
    services.happens(vmEvent(1));
    services.happens(vmEvent(2, { kind: 'stopped', exit }));
    expect(await client().get('/v1/events/vms')).toMatchObject([{ kind: 'started' }, { kind: 'stopped', exit }]);
    expect(await client().get('/v1/events/vms?after=f00d-1')).toMatchObject([{ id: 'f00d-2' }]);
    const seen: string[] = [];
    const stop = new AbortController();
    const following = client().followVms('f00d-1', ({ id }) => void seen.push(id), { signal: stop.signal });
    await expect.poll(() => seen).toEqual(['f00d-2']);
    services.happens(vmEvent(3, { kind: 'gone' }));
    await expect.poll(() => seen).toEqual(['f00d-2', 'f00d-3']);
    stop.abort();
    await following;

    services.jobs.views.set('job-1', jobView('job-1'));
    const text = await raw('GET /v1/events HTTP/1.1\r\nHost: x\r\nLast-Event-ID: f00d-2\r\n\r\n', true);
    // A job's view has no id: it would make the reader begin anew.
    expect(text.match(/^(?:event|id): .*$/gm)).toEqual(['event: vm', 'id: f00d-3', 'event: job']);
  });

  test('of VMs do not pile up either: a slow reader misses those that are not kept any more', async () => {
    const kept = Array.from({ length: 1024 }, (_, index) => vmEvent(index, { vm: 'x'.repeat(4000) }));
    services.vmEvents.list = () => kept;
    let wake = () => undefined as void;
    services.vmEvents.subscribe = (onEvent) => {
      wake = onEvent;
      return () => true;
    };
    const socket = netConnect(socketPath);
    socket.write('GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n');
    await once(socket, 'data');
    socket.pause();
    const before = process.memoryUsage().heapUsed;
    for (let turn = 0; turn < 200; turn++) wake();
    globalThis.gc?.();
    // 800 MB would have been sent.
    expect(process.memoryUsage().heapUsed - before).toBeLessThan(30 * 2 ** 20);
    socket.destroy();
  });

  test('do not pile up for a reader that does not read', async () => {
    services.jobs.views.set('job-1', jobView('job-1'));
    const socket = netConnect(socketPath);
    socket.write('GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n');
    await once(socket, 'data');
    socket.pause();
    while (services.jobs.listeners.size < 2) await new Promise((resolve) => setTimeout(resolve, 5));
    const before = process.memoryUsage().heapUsed;
    const padding = 'x'.repeat(20_000);
    for (let index = 0; index < 5000; index++)
      services.jobs.change('job-1', { state: 'done', updatedAt: padding + index });
    globalThis.gc?.();
    // 100 MB of views have passed. At most one of them waits, besides those in the kernel's buffers.
    expect(process.memoryUsage().heapUsed - before).toBeLessThan(30 * 2 ** 20);
    socket.destroy();
    while (services.jobs.listeners.size > 1) await new Promise((resolve) => setTimeout(resolve, 5));
  });

  test('end with the server, which does not wait for its readers', async () => {
    services.jobs.views.set('job-1', jobView('job-1'));
    const following = client().followJob('job-1', () => false);
    while (services.jobs.listeners.size < 2) await new Promise((resolve) => setTimeout(resolve, 5));
    const startedMs = performance.now();
    await server.close();
    await following;
    expect(performance.now() - startedMs).toBeLessThan(1500);
  });
});

describe('a daemon that takes connections and is silent', () => {
  let silent: Server;
  let answer = '';
  beforeEach(async () => {
    silent = createServer((socket) => {
      socket.on('error', () => undefined);
      socket.resume();
      socket.write(answer);
    });
    await new Promise<void>((resolve) => silent.listen(join(directory, 'silent.sock'), resolve));
  });
  afterEach(() => new Promise((resolve) => silent.close(resolve)));

  const ask = () =>
    new ApiClient({ host: `unix:${join(directory, 'silent.sock')}`, tls: null, answerMsMax: 200, silenceMsMax: 200 });
  const isSilent = {
    code: 'UNREACHABLE',
    message: expect.stringMatching(/has taken the connection, but has been silent for 0.2 s/) as string,
    remedy: expect.stringContaining('stopped or very busy') as string,
  };

  test.each([
    ['at once', ''],
    ['in the middle of its answer', 'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n[1'],
  ])('is not waited for: %s', async (_, text) => {
    answer = text;
    await expect(ask().get('/v1/vms')).rejects.toMatchObject(isSilent);
    await expect(ask().followJob('job-1', () => false)).rejects.toMatchObject(isSilent);
    if (text === '') await expect(ask().serialLog('web')).rejects.toMatchObject(isSilent);
  });

  test.each([
    ['in the middle of a serial log', 'hello'],
    ['before the first byte of a serial log', ''],
  ])('is not waited for %s', async (_, text) => {
    answer = `HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n${text}`;
    await expect(readAll(await ask().serialLog('web'))).rejects.toMatchObject(isSilent);
  });

  test('is not waited for in the middle of a refusal', async () => {
    answer = 'HTTP/1.1 409 Conflict\r\nContent-Length: 1000\r\n\r\n{';
    await expect(ask().followJob('job-1', () => false)).rejects.toMatchObject(isSilent);
  });

  test('or ends in the middle of its answer is away, not a bug', async () => {
    silent.on('connection', (socket) => setTimeout(() => socket.destroy(), 50));
    answer = 'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n[1';
    await expect(ask().get('/v1/vms')).rejects.toMatchObject({ code: 'UNREACHABLE' });
  });
});

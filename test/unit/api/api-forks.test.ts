/** The API's routes for forks, images and waiting processes. */
import type { InjectOptions } from 'fastify';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { MigrationError } from '../../../src/domain/errors.js';
import { type FakeServices, FORK_REPORT, fakeServices, imageView, vmView } from '../../support/api-fakes.js';

const IMAGE = '00112233445566ff';
let services: FakeServices;
let server: ApiServer;

beforeEach(() => {
  services = fakeServices();
  server = buildServer(services);
});
afterEach(() => server.close());

async function inject(method: InjectOptions['method'], url: string, payload?: object) {
  const answer = await server.app.inject({
    method,
    url,
    ...(payload === undefined ? {} : { payload }),
  } as InjectOptions);
  return { status: answer.statusCode, body: answer.json<unknown>() };
}

describe('forks', () => {
  test('are submitted with defaults filled in', async () => {
    const { status, body } = await inject('POST', '/v1/forks', { vm: 'web', cloneCount: 2 });
    expect(status).toBe(202);
    expect(body).toMatchObject({ kind: 'fork', vm: 'web', cloneCount: 2, clones: ['web-0', 'web-1'] });
    expect(services.jobs.forkRequests).toEqual([
      {
        vm: 'web',
        image: null,
        cloneCount: 2,
        namePrefix: null,
        parentMode: 'continue',
        memory: 'cow',
        network: 'fresh',
        disks: 'overlay',
        isPartialAllowed: false,
      },
    ]);
  });

  test('that pre-flight refuses say why, submitted or not', async () => {
    services.jobs.refusals = [{ code: 'CLONE_COUNT', reason: '0 clones', remedy: 'more' }];
    const asked = { vm: 'web', cloneCount: 0 };
    expect(await inject('POST', '/v1/forks', asked)).toMatchObject({
      status: 422,
      body: { code: 'PREFLIGHT_REFUSED', details: [{ code: 'CLONE_COUNT' }] },
    });
    expect(await inject('POST', '/v1/forks', { ...asked, dryRun: true })).toMatchObject({
      status: 200,
      body: { plan: null, refusals: [{ code: 'CLONE_COUNT' }] },
    });
  });

  test.each([
    ['neither VM nor image', { cloneCount: 1 }, 400, 'USAGE'],
    ['both', { vm: 'web', image: IMAGE, cloneCount: 1 }, 400, 'USAGE'],
    ['no count', { vm: 'web' }, 400, 'USAGE'],
    ['half a clone', { vm: 'web', cloneCount: 1.5 }, 400, 'USAGE'],
    ['an unknown key', { vm: 'web', cloneCount: 1, speed: 9 }, 400, 'USAGE'],
    ['an image that is a path', { image: '../../etc/passwd', cloneCount: 1 }, 400, 'USAGE'],
    ['a prefix that makes no name', { vm: 'web', cloneCount: 1, namePrefix: '-x' }, 400, 'USAGE'],
    ['a host twice', { vm: 'web', cloneCount: 2, hosts: ['A', 'B', 'A'] }, 400, 'USAGE'],
    [
      'numbers that do not add up',
      { vm: 'web', cloneCount: 2, hosts: ['A', { host: 'B', cloneCount: 3 }] },
      400,
      'USAGE',
    ],
  ])('with %s are refused', async (_, asked, status, code) => {
    expect(await inject('POST', '/v1/forks', asked)).toMatchObject({ status, body: { code } });
    expect(services.jobs.forkRequests).toEqual([]);
  });

  test('may name this host', async () => {
    expect(await inject('POST', '/v1/forks', { vm: 'web', cloneCount: 1, hosts: ['A'] })).toMatchObject({
      status: 202,
    });
    expect(services.jobs.forkRequests[0]).not.toHaveProperty('hosts');
  });

  test('may name other hosts, or all', async () => {
    const asked = { vm: 'web', cloneCount: 3, hosts: ['A', { host: 'B', cloneCount: 2 }], placement: 'pack' };
    expect(await inject('POST', '/v1/forks', asked)).toMatchObject({ status: 202 });
    expect(await inject('POST', '/v1/forks', { vm: 'web', cloneCount: 3, hosts: 'all' })).toMatchObject({
      status: 202,
    });
    const own = { host: 'A', cloneCount: null };
    expect(services.jobs.forkRequests).toMatchObject([
      { hosts: [own, { host: 'B', cloneCount: 2 }], placement: 'pack', fetch: 'all', transport: 'auto' },
      { hosts: [own, { host: 'B', cloneCount: null }], placement: 'spread' },
    ]);
  });
});

describe('images', () => {
  beforeEach(() => {
    services.images.views.set(IMAGE, imageView(IMAGE));
  });

  test('are listed, shown and removed', async () => {
    expect(await inject('GET', '/v1/images')).toMatchObject({ status: 200, body: [{ id: IMAGE }] });
    expect(await inject('GET', `/v1/images/${IMAGE}`)).toMatchObject({ body: { parent: 'web' } });
    expect(await inject('DELETE', `/v1/images/${IMAGE}`)).toMatchObject({ status: 200, body: { id: IMAGE } });
    expect(await inject('GET', `/v1/images/${IMAGE}`)).toMatchObject({ status: 404, body: { code: 'NOT_FOUND' } });
  });

  test('are kept while clones run on them', async () => {
    services.images.views.set(IMAGE, imageView(IMAGE, { clones: ['web-0'] }));
    expect(await inject('DELETE', `/v1/images/${IMAGE}`)).toMatchObject({ status: 409, body: { code: 'CONFLICT' } });
  });

  test('are saved and loaded', async () => {
    const file = { path: '/srv/web.image' };
    expect(await inject('POST', `/v1/images/${IMAGE}/save`, file)).toMatchObject({ body: { fileBytes: 4096 } });
    services.images.views.clear();
    expect(await inject('POST', '/v1/images/load', file)).toMatchObject({ status: 201, body: { id: IMAGE } });
    expect(await inject('POST', '/v1/images/load', { path: 'web.image' })).toMatchObject({ status: 400 });
  });

  test('all clones of one are stopped; those that cannot be are named', async () => {
    const names = Array.from({ length: 40 }, (_, index) => `web-${index}`);
    services.images.views.set(IMAGE, imageView(IMAGE, { clones: names }));
    for (const name of names) await services.vms.run(vmView(name) as never);
    services.ends('web-3', 'bye', 7, IMAGE);
    services.images.views.set(IMAGE, imageView(IMAGE, { clones: names.filter((name) => name !== 'web-3') }));
    const stop = services.vms.stop.bind(services.vms);
    services.vms.stop = async (name, options) => {
      if (name === 'web-7') throw new TypeError('it holds on');
      const result = await stop(name, options);
      if (name === 'web-39') throw new MigrationError('NOT_FOUND', 'it has ended and was removed meanwhile');
      return result;
    };
    const { body } = await inject('POST', `/v1/images/${IMAGE}/stop`);
    const { stopped, failures } = body as { stopped: string[]; failures: object[] };
    expect(stopped.sort()).toEqual(names.filter((name) => name !== 'web-7').sort());
    expect(failures).toMatchObject([{ name: 'web-7', host: 'A', error: { code: 'INTERNAL' } }]);
    expect(services.vms.list().map(({ name }) => name)).toEqual(['web-7']);
  });
});

test('waiting processes are made, listed and ended', async () => {
  const asked = { vm: 'web', cloneCount: 8, network: 'none' };
  expect(await inject('POST', '/v1/pool', asked)).toMatchObject({ status: 201, body: { readyCount: 8 } });
  expect(services.pool.requests).toMatchObject([{ ...asked, memory: 'cow', disks: 'overlay', namePrefix: null }]);
  expect(await inject('GET', '/v1/pool')).toMatchObject({ body: [{ vm: 'web', network: 'none' }] });
  expect(await inject('POST', '/v1/pool/drain', { vm: 'other' })).toMatchObject({ body: { endedCount: 0 } });
  expect(await inject('POST', '/v1/pool/drain')).toMatchObject({ body: { endedCount: 8 } });
});

test('metrics count clones, pauses, images and waiting processes', async () => {
  services.images.views.set(IMAGE, imageView(IMAGE, { allocatedBytes: 5 }));
  await inject('POST', '/v1/pool', { vm: 'web', cloneCount: 3 });
  await inject('POST', '/v1/forks', { vm: 'web', cloneCount: 2 });
  services.jobs.change('job-1', { state: 'done', report: FORK_REPORT });
  const { body } = await server.app.inject({ method: 'GET', url: '/metrics' });
  for (const line of [
    'vmigrate_jobs_ended_total{state="done"} 1',
    'vmigrate_clones_total 2',
    'vmigrate_fork_pause_seconds_total 0.0145',
    `vmigrate_fork_copied_bytes_total ${2 ** 27}`,
    'vmigrate_fork_sent_bytes_total 0',
    'vmigrate_fork_faults_total{side="parent"} 12',
    'vmigrate_fork_faults_total{side="clones"} 34',
    'vmigrate_images{state="complete"} 1',
    'vmigrate_image_bytes 5',
    'vmigrate_pool_processes 3',
  ])
    expect(body).toContain(`${line}\n`);
});

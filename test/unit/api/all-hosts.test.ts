/** Questions about images, clones and VMs that go to all hosts: what they find, and whom they name as silent. */
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { hostOfCalls } from '../../../src/api/peers/methods.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { MigrationError } from '../../../src/domain/errors.js';
import { type FakeServices, fakeServices, imageView, vmView } from '../../support/api-fakes.js';

const IMAGE = '00112233445566ff';
type Answers = Readonly<Record<string, (...args: never[]) => unknown>>;

let services: FakeServices;
let server: ApiServer;
/** What peers answer, by host and call. A call without an answer fails as on a host that does not know it. */
let peers: Record<string, Answers>;
let calls: string[];

const clone = (name: string, host: string, change = {}) => vmView(name, { host, image: IMAGE, ...change });
const unreachable = () => Promise.reject(new MigrationError('UNREACHABLE', 'host C cannot be reached'));
const DOWN: Answers = { vmViews: unreachable, imageViews: unreachable, imageClones: unreachable };

beforeEach(() => {
  calls = [];
  peers = {
    B: {
      vmViews: () => ({ vms: [clone('web-1', 'B'), vmView('db', { host: 'B' })] }),
      imageViews: () => ({ images: [imageView(IMAGE, { host: 'B', state: 'filling', pagesDone: 10 })] }),
      imageClones: () => ({ clones: [clone('web-1', 'B'), clone('web-2', 'B', { state: 'stopped' })] }),
      stopClones: (asked: { name: string }[]) => ({ stopped: asked.map(({ name }) => name), failures: [] }),
      removeImage: () => ({ id: IMAGE, freedBytes: 7, mergedDisks: [], keptLayers: [] }),
    },
    C: DOWN,
    D: {},
  };
  const port = (host: string) =>
    hostOfCalls(host, async ({ name }, args) => {
      calls.push(`${host}.${name}`);
      const answer = peers[host]?.[name];
      if (answer === undefined) throw new MigrationError('NOT_FOUND', `no route POST /agent/v1/call/${name}`);
      return answer(...(args as never[]));
    });
  const base = fakeServices().peers;
  services = fakeServices({
    peers: {
      ...base,
      get names() {
        return Object.keys(peers);
      },
      agent: port,
    },
  });
  server = buildServer(services);
});
afterEach(() => server.close());

async function inject(method: 'GET' | 'POST' | 'DELETE', url: string, payload?: object) {
  const answer = await server.app.inject({ method, url, ...(payload === undefined ? {} : { payload }) });
  return { status: answer.statusCode, body: answer.json<Record<string, unknown>>() };
}

const unanswered = [
  { host: 'C', error: { code: 'UNREACHABLE' } },
  { host: 'D', error: { code: 'UNSUPPORTED', remedy: 'upgrade vmigrated on D' } },
];

describe('all hosts', () => {
  beforeEach(async () => {
    services.images.views.set(IMAGE, imageView(IMAGE, { clones: ['web-0'] }));
    await services.vms.run(vmView('web-0') as never);
  });

  test('are asked for images, VMs and clones, and those that do not answer are named', async () => {
    const images = await inject('GET', '/v1/images?allHosts=true');
    expect(images.body).toMatchObject({
      images: [
        { id: IMAGE, host: 'A' },
        { id: IMAGE, host: 'B', pagesDone: 10 },
      ],
      unanswered,
    });
    const vms = await inject('GET', '/v1/vms?allHosts=true');
    expect(vms.body).toMatchObject({ vms: [{ name: 'web-0' }, { name: 'web-1' }, { name: 'db' }], unanswered });
    const clones = await inject('GET', `/v1/images/${IMAGE}/clones`);
    expect(clones.body).toMatchObject({
      clones: [{ name: 'web-0' }, { name: 'web-1' }, { name: 'web-2' }],
      unanswered,
    });
  });

  test('are asked only if the client says so', async () => {
    expect(await inject('GET', '/v1/images')).toMatchObject({ body: [{ id: IMAGE }] });
    expect(await inject('GET', '/v1/vms?allHosts=false')).toMatchObject({ body: [{ name: 'web-0' }] });
    expect(await inject('POST', `/v1/images/${IMAGE}/stop`)).toMatchObject({
      body: { stopped: ['web-0'], failures: [], unanswered: [] },
    });
    expect(await inject('DELETE', `/v1/images/${IMAGE}`)).toMatchObject({ status: 409 });
    expect(calls).toEqual([]);
  });

  test('one that never answers is waited for only so long', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    try {
      peers = { B: { vmViews: () => new Promise(() => undefined) } };
      const asked = inject('GET', '/v1/vms?allHosts=true');
      await vi.waitFor(() => expect(calls).toEqual(['B.vmViews']));
      await vi.advanceTimersByTimeAsync(5_000);
      expect((await asked).body).toMatchObject({
        vms: [{ name: 'web-0' }],
        unanswered: [{ host: 'B', error: { code: 'TIMEOUT' } }],
      });
    } finally {
      vi.useRealTimers();
    }
  });

  test('end their clones of an image, and say which could not be ended', async () => {
    const error = new MigrationError('VM_BUSY', 'part of job-7').toJSON();
    const stopClones = vi.fn(() => ({ stopped: ['web-2'], failures: [{ name: 'web-1', error }] }));
    peers = { ...peers, B: { ...peers.B, stopClones } };
    const { body } = await inject('POST', `/v1/images/${IMAGE}/stop`, { allHosts: true, force: true });
    expect(body).toMatchObject({
      stopped: ['web-0', 'web-2'],
      failures: [{ name: 'web-1', host: 'B', error: { code: 'VM_BUSY' } }],
      unanswered,
    });
    const [{ uuid }] = [vmView('web-1')];
    expect(stopClones.mock.calls).toEqual([[['web-1', 'web-2'].map((name) => ({ name, uuid })), true]]);
  });

  test('end clones that have moved, by name and UUID, and no other VM of that name', async () => {
    const { uuid } = vmView('web-1');
    const clones = [
      { name: 'web-0', uuid: 'f'.repeat(8) },
      { name: 'web-1', uuid },
      { name: 'web-9', uuid },
    ];
    const { body } = await inject('POST', '/v1/clones/stop', { clones, force: true });
    expect(body).toMatchObject({ stopped: ['web-1'], failures: [], unanswered });
    expect(services.vms.list().map(({ name }) => name)).toEqual(['web-0']);
  });

  test('remove an image, those that others read after them', async () => {
    await services.vms.stop('web-0', { isForced: true, gracefulMs: 0 });
    services.images.views.set(IMAGE, imageView(IMAGE));
    const remove = services.images.remove.bind(services.images);
    let isRead = true;
    services.images.remove = async (id, options) => {
      if (isRead) throw new MigrationError('CONFLICT', 'B reads it');
      return remove(id, options);
    };
    const ofB = peers.B?.removeImage as () => unknown;
    peers = { ...peers, B: { ...peers.B, removeImage: () => ((isRead = false), ofB()) } };
    const { body } = await inject('DELETE', `/v1/images/${IMAGE}`, { allHosts: true });
    expect(body).toMatchObject({
      removals: [
        { host: 'B', removal: { freedBytes: 7 } },
        { host: 'A', removal: { id: IMAGE } },
      ],
      failures: [],
      unanswered,
    });
  });

  test('remove an image whose disks another one needed until then', async () => {
    await services.vms.stop('web-0', { isForced: true, gracefulMs: 0 });
    services.images.views.set(IMAGE, imageView(IMAGE));
    const remove = services.images.remove.bind(services.images);
    const kept = { id: IMAGE, freedBytes: 5, mergedDisks: [], keptLayers: [{ path: '/d0', reason: 'needed by B' }] };
    let isRead = true;
    const ofB = peers.B?.removeImage as () => unknown;
    peers = { B: { ...peers.B, removeImage: () => ((isRead = false), ofB()) } };
    services.images.remove = async (id, options) => {
      const wasRead = isRead;
      await new Promise((resolve) => setTimeout(resolve, 1));
      return wasRead ? kept : { ...(await remove(id, options)), freedBytes: 0 };
    };
    const { body } = await inject('DELETE', `/v1/images/${IMAGE}`, { allHosts: true });
    expect(body).toMatchObject({
      removals: [
        { host: 'A', removal: { freedBytes: 5, keptLayers: [] } },
        { host: 'B', removal: { freedBytes: 7 } },
      ],
      failures: [],
    });
  });

  test('that cannot remove it say why', async () => {
    peers = { B: { ...peers.B, removeImage: () => Promise.reject(new MigrationError('CONFLICT', 'it has clones')) } };
    expect(await inject('DELETE', `/v1/images/${IMAGE}`, { allHosts: true })).toMatchObject({
      body: { removals: [], failures: [{ host: 'A', error: { code: 'CONFLICT' } }, { host: 'B' }] },
    });
  });
});

test('an image that nobody has is NOT_FOUND, and the hosts that were not heard are named', async () => {
  peers = { C: DOWN };
  const refused = { status: 404, body: { code: 'NOT_FOUND', remedy: expect.stringContaining('no answer from C') } };
  expect(await inject('POST', `/v1/images/${IMAGE}/stop`, { allHosts: true })).toMatchObject(refused);
  expect(await inject('GET', `/v1/images/${IMAGE}/clones`)).toMatchObject(refused);
  expect(await inject('DELETE', `/v1/images/${IMAGE}`, { allHosts: true })).toMatchObject(refused);
});

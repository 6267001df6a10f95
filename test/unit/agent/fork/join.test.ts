/** What a host that joins a fork, and the host of the image, refuse or survive; with fakes of native and of images. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { afterEach, expect, test } from 'vitest';
import { ForkPages } from '../../../../src/agent/fork/pages.js';
import { ForkSession } from '../../../../src/agent/fork/session.js';
import { PageLink, type PageReader } from '../../../../src/agent/migration/page-link.js';

const IMAGE = '3'.repeat(16);
const FORK = '4'.repeat(16);
const HOLDER = {
  ...{ session: 's', token: 't' },
  endpoint: { transport: 'tcp', host: 'h', port: 1, keys: [] },
} as const;
const ORIGIN = { host: 'B', image: IMAGE };
const PARENT = { image: null, regions: [], memory: null };
const conflict = expect.objectContaining({ code: 'CONFLICT' });
const nothing = async (): Promise<void> => undefined;
const directories: string[] = [];

afterEach(() => {
  for (const directory of directories.splice(0)) rmSync(directory, { recursive: true, force: true });
});

function scene(change: { image?: object; request?: object; state?: string } = {}) {
  const directory = mkdtempSync(join(tmpdir(), 'vmg-join-'));
  directories.push(directory);
  const calls: string[] = [];
  const memory = { sizeBytes: 1 << 24, pageBytes: 4096, regions: [] };
  let image: object = {
    ...{ id: IMAGE, state: 'capturing', spec: { name: 'web', memory }, deviceStateBytes: 0, overlays: [] },
    ...change.image,
  };
  const images = {
    has: () => true,
    get: () => image,
    update: async (_: string, changed: object) => {
      image = { ...image, ...changed };
    },
    statePath: () => join(directory, 'state'),
    withPresence: async () => [],
    regions: async () => [],
    setFilling: () => undefined,
    delete: async () => void calls.push('delete image'),
  };
  const counters = { pagesCopied: 0n, pagesZero: 0n, reconnectCount: 0n };
  const reader = () => ({
    connect: async () => void calls.push('connect'),
    start: () => void calls.push('start'),
    sweep: () => void calls.push('sweep'),
    snapshot: () => ({ state: 'copying', failure: null, counters }),
    close: async () => void calls.push('close'),
  });
  const native = {
    openImageFetch: reader,
    openImageCapture: () => ({ ...reader(), arm: nothing, resume: nothing, leave: nothing }),
    openSourceSession: async (options: object) => {
      calls.push('image' in options ? 'serve the capture' : 'serve the files');
      return { keys: [], scan: () => void calls.push('scan'), close: nothing };
    },
  };
  const transports = {
    connection: async () => ({ provider: 'tcp', options: {}, timeoutMs: 1 }),
    registering: (_: string, work: () => Promise<unknown>) => work(),
    served: async () => ({ provider: 'tcp', listener: {} }),
    place: () => ({ host: 'h', port: 1 }),
  };
  const quiet = () => undefined;
  const context = {
    ...{ images, native, transports, host: 'A' },
    log: { debug: quiet, warn: quiet, error: quiet, info: quiet },
    vms: { endClone: nothing, room: { release: quiet }, has: () => false },
    inject: { hit: nothing },
    forkStore: { save: nothing, remove: nothing },
  } as never;
  const request = {
    ...{ fork: FORK, job: 'j', vm: null, image: null, cloneCount: 2, parentMode: 'continue', memory: 'cow' },
    ...{ isPartialAllowed: false, ...change.request },
  };
  const record = {
    ...{ version: 1, request, image: IMAGE, state: change.state ?? 'prepared', runsAfterCommit: true },
    ...{ isWarm: false, clones: [], outcome: null, failure: null },
  } as never;
  const session = () => new ForkSession(context, { record, parent: null, clones: [], failures: [] });
  return { context, record, calls, directory, session, image: () => image };
}

test('private clones of a host that joins have the whole image read, and can be given up meanwhile', async () => {
  const { session, calls } = scene({ request: { origin: ORIGIN, memory: 'private' }, image: { deviceStateBytes: 5 } });
  const fork = session();
  await fork.connectImage(HOLDER);
  const loading = fork.load();
  const refused = expect(loading).rejects.toThrow(conflict);
  await expect.poll(() => calls).toContain('sweep');
  await fork.discard();
  await refused;
  expect(calls).toContain('close');
});

test('a host that is restarted after the commit says again which pages are holes', async () => {
  const { context, record, calls } = scene({
    ...{ state: 'committed', image: { state: 'filling' }, request: { vm: 'web' } },
  });
  const pages = new ForkPages(context, record, PARENT as never);
  await pages.resume([], () => undefined);
  await pages.serve('tcp');
  expect(calls).toEqual(['serve the capture', 'scan']);
});

test('files of an image that lack pages are served to nobody', async () => {
  const root = scene({ request: { vm: 'web' } });
  const unarmed = new ForkPages(root.context, root.record, PARENT as never);
  await expect(unarmed.serve('tcp')).rejects.toThrow(conflict);
  const leaf = scene({ request: { origin: ORIGIN } });
  const joined = new ForkPages(leaf.context, leaf.record, null);
  await joined.connect(HOLDER, []);
  await expect(joined.serve('tcp')).rejects.toThrow(conflict);
  expect([...root.calls, ...leaf.calls].filter((call) => call.startsWith('serve'))).toEqual([]);
});

test.each([
  ['a fork that does not join', { image: IMAGE }],
  ['a fork that joins on an image that is complete here', { image: IMAGE, origin: ORIGIN }],
])('the device state of a complete image is not replaced: %s', async (_, request) => {
  const { session, directory, image } = scene({ request, image: { state: 'complete', deviceStateBytes: 5 } });
  writeFileSync(join(directory, 'state'), 'GOOD!');
  const torn = new Readable({
    read() {
      this.destroy(new Error('cut off'));
    },
  });
  for (const body of [torn, Readable.from(['other'])])
    await session()
      .acceptState(body)
      .catch(() => undefined);
  expect(readFileSync(join(directory, 'state'), 'utf8')).toBe('GOOD!');
  expect(image()).toMatchObject({ state: 'complete', deviceStateBytes: 5 });
});

test('a device state that breaks off is none', async () => {
  const { session, image } = scene({ request: { origin: ORIGIN } });
  const fork = session();
  await fork.connectImage(HOLDER);
  const torn = Readable.from(
    (function* () {
      yield 'half';
      throw new Error('cut off');
    })(),
  );
  await expect(fork.acceptState(torn)).rejects.toThrow('cut off');
  expect(image()).toMatchObject({ deviceStateBytes: 0 });
  await expect(fork.load()).rejects.toThrow(conflict);
});

test('a loss that is reported before the connect has returned is not forgotten', async () => {
  const { context } = scene();
  let state = 'copying';
  let connectCount = 0;
  const reader: PageReader = {
    connect: async () => {
      state = ++connectCount === 1 ? 'disconnected' : 'copying';
      if (connectCount === 1) link.noteLost(null);
    },
    snapshot: () => ({ state, failure: null }),
    close: nothing,
  };
  const link: PageLink<PageReader> = new PageLink(context, {
    ...{ open: () => reader, isResume: false, reading: 'copying', fields: {} },
    ...{ onConnected: () => undefined, onReplace: () => undefined },
  });
  await link.connect(HOLDER);
  expect(link.isConnected).toBe(false);
  await expect.poll(() => link.isConnected, { timeout: 10_000 }).toBe(true);
  expect(connectCount).toBe(2);
  await link.close();
});

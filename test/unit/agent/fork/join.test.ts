/** What a host that joins a fork, and the host of the image, refuse or survive; with fakes of native and of images. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, expect, test, vi } from 'vitest';
import { failedImage } from '../../../../src/agent/fork/pages/failed-image.js';
import { ForkPages } from '../../../../src/agent/fork/pages.js';
import { type PageHolder, PageLink, type PageReader } from '../../../../src/agent/migration/page-link.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import { NATIVE_ERROR } from '../../../../src/protocol/wire.js';
import { HOLDER, IMAGE, removeScenes, scene } from '../../../support/join-scene.js';

const ORIGIN = { host: 'B', image: IMAGE };
const PARENT = { image: null, regions: [], memory: null };
const conflict = expect.objectContaining({ code: 'CONFLICT' });
const nothing = async (): Promise<void> => undefined;

afterEach(removeScenes);

test('private clones of a host that joins have the whole image read, and can be given up meanwhile', async () => {
  const { session, calls } = scene({ request: { origin: ORIGIN, memory: 'private' }, image: { deviceStateBytes: 5 } });
  const fork = session();
  await fork.connectImage('tcp');
  const loading = fork.load();
  const refused = expect(loading).rejects.toThrow(conflict);
  await expect.poll(() => calls).toContain('sweep');
  await fork.discard();
  await refused;
  expect(calls).toContain('close');
});

test('a host that is restarted after the commit says again which pages are holes', async () => {
  const { context, servers, record, calls } = scene({
    ...{ state: 'committed', image: { state: 'filling' }, request: { vm: 'web' } },
  });
  const pages = new ForkPages(context, record, PARENT as never);
  await pages.resume([], () => undefined);
  await servers.serve(IMAGE, 'B', 'tcp', pages.served);
  expect(calls).toEqual(['serve the capture', 'scan']);
});

test('a capture is served only when the next daemon has taken it up', async () => {
  let resumed = (): void => undefined;
  const { context, record } = scene({
    ...{ state: 'committed', image: { state: 'filling' }, request: { vm: 'web' } },
    resuming: new Promise((resolve) => {
      resumed = resolve;
    }),
  });
  const pages = new ForkPages(context, record, PARENT as never);
  const opened = vi.fn();
  const resuming = pages.resume([], opened);
  await expect.poll(() => opened.mock.calls).toHaveLength(1);
  expect(() => pages.served).toThrow(conflict);
  resumed();
  await resuming;
  expect(pages.served).toMatchObject({ isFixed: true });
});

test('a host whose holder refuses the old session reads all of the image as soon as it has another', async () => {
  const { context, record, calls, reader, edge } = scene({ ...{ state: 'committed' }, request: { origin: ORIGIN } });
  const pages = new ForkPages(context, record, null);
  await pages.connect('tcp', []);
  reader.state = 'failed';
  reader.failure = { code: NATIVE_ERROR.REFUSED, what: 'peer refused the session', errno: 0 };
  edge();
  expect(pages.failure).toBeNull();
  await pages.fill().catch(() => undefined);
  reader.state = 'copying';
  reader.failure = null;
  await pages.connect('shm', []);
  expect(calls).toContain('sweep');
});

test('a session that has failed for good is not replaced by one that has not', async () => {
  const { context, record, calls, reader, edge } = scene({ ...{ state: 'committed' }, request: { origin: ORIGIN } });
  const pages = new ForkPages(context, record, null);
  await pages.connect('tcp', []);
  const before = calls.length;
  reader.state = 'failed';
  reader.failure = { code: NATIVE_ERROR.NO_SPACE, what: 'full', errno: 28 };
  edge();
  await pages.fill().catch(() => undefined);
  await sleep(100);
  expect(calls.slice(before)).not.toContain('connect');
  expect(pages.failure).toMatchObject({ code: 'NO_SPACE' });
});

test('a failure that shows only when a session is replaced is not hidden by the next one', async () => {
  const { context, record, calls, reader, root } = scene({ ...{ state: 'committed' }, request: { origin: ORIGIN } });
  const pages = new ForkPages(context, record, null);
  await pages.connect('tcp', []);
  const connects = () => calls.filter((call) => call === 'connect').length;
  expect(connects()).toBe(1);
  // It is still reading when the holder changes, and its last page is wrong.
  root.serveImage = async () => ({ ...HOLDER, session: 'another' });
  reader.onClose = () => {
    reader.state = 'closed';
    reader.failure = { code: NATIVE_ERROR.DAMAGED, what: 'a page is not what its digest says', errno: 0 };
  };
  await expect(pages.connect('shm', [])).rejects.toThrow(conflict);
  expect(connects()).toBe(1);
  expect(pages.failure).toMatchObject({ code: 'DAMAGED' });
  expect(await pages.filling?.over).toBe('failed');
});

test('a session that cannot be opened leaves no digests open', async () => {
  const { context, record, calls } = scene({ request: { origin: ORIGIN } });
  const full = new MigrationError('NO_SPACE', 'full');
  const { native } = context as unknown as { native: { openImageFetch: () => never } };
  native.openImageFetch = () => {
    throw full;
  };
  await expect(new ForkPages(context, record, null).connect('tcp', [])).rejects.toBe(full);
  expect(calls).toEqual(['close the digests']);
});

test('files of an image that lack pages are served to nobody', async () => {
  const root = scene({ request: { vm: 'web' } });
  const unarmed = new ForkPages(root.context, root.record, PARENT as never);
  expect(() => unarmed.served).toThrow(conflict);
  const leaf = scene({ request: { origin: ORIGIN } });
  const joined = new ForkPages(leaf.context, leaf.record, null);
  await joined.connect('tcp', []);
  expect(() => joined.served).toThrow(conflict);
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
  await fork.connectImage('tcp');
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

/** A link whose holders take the session as `takes` says. */
function linkWith(takes: (session: string) => boolean, findHolder: () => Promise<PageHolder>) {
  const { context } = scene();
  const tried: string[] = [];
  let state = 'copying';
  const reader: PageReader = {
    connect: async ({ session }) => {
      tried.push(session);
      if (!takes(session)) throw new MigrationError('UNAUTHENTICATED', 'no such session');
      state = 'copying';
    },
    snapshot: () => ({ state, failure: null }),
    close: nothing,
  };
  const link: PageLink<PageReader> = new PageLink(context, {
    ...{ open: () => reader, isResume: false, reading: 'copying', fields: {}, findHolder },
    ...{ onConnected: () => undefined, onReplace: () => undefined },
  });
  const lose = () => {
    state = 'disconnected';
    link.noteLost(null);
  };
  return { link, tried, lose };
}

test('a lost connection is taken back by its holder, or another one is asked for, soon', async () => {
  let [session, asked] = ['s', 0];
  const { link, tried, lose } = linkWith(
    (named) => named === session,
    async () => {
      asked++;
      return { ...HOLDER, session };
    },
  );
  await link.connect(HOLDER);
  await sleep(1_050);
  lose();
  await expect.poll(() => link.isConnected, { interval: 5, timeout: 500 }).toBe(true);
  expect([tried, asked]).toEqual([['s', 's'], 0]);

  session = 'another';
  // A connection that breaks at once is not asked for again from the same holder.
  lose();
  await expect.poll(() => link.isConnected, { interval: 5, timeout: 500 }).toBe(true);
  expect([tried, asked]).toEqual([['s', 's', 'another'], 1]);
  await link.close();
});

test('a holder that is not found shows as trouble, and is asked for less and less often', async () => {
  let asked = 0;
  let isThere = false;
  const { link, lose } = linkWith(
    () => true,
    async () => {
      asked++;
      if (!isThere) throw new MigrationError('NOT_FOUND', 'no image');
      return HOLDER;
    },
  );
  await link.connect(HOLDER);
  lose();
  await sleep(1_000);
  expect(link.trouble?.code).toBe('NOT_FOUND');
  expect(asked).toBeLessThanOrEqual(9);
  isThere = true;
  await expect.poll(() => link.isConnected, { timeout: 5_000 }).toBe(true);
  expect(link.trouble).toBeNull();
  await link.close();
});

test('clones of an image that has failed on its host are ended, those of an image that is gone are not', async () => {
  const { session, root, calls, image } = scene({
    ...{ request: { origin: ORIGIN }, state: 'committed', image: { state: 'filling', deviceStateBytes: 5 } },
    isCut: true,
  });
  root.serveImage = () => Promise.reject(new MigrationError('NOT_FOUND', 'no image'));
  const fork = session();
  await fork.resume();
  await expect.poll(async () => (await fork.progress()).error, { timeout: 5_000 }).toMatchObject({ code: 'NOT_FOUND' });
  expect(await fork.progress()).toMatchObject({ state: 'filling' });
  root.serveImage = () => Promise.reject(failedImage(IMAGE, 'B'));
  await expect.poll(async () => (await fork.progress()).state, { timeout: 5_000 }).toBe('failed');
  await expect.poll(() => calls).toContain('end reading');
  expect(image()).toMatchObject({ state: 'failed' });
});

test.each([
  ['lacks pages', 'all', 'failed'],
  ['lacks pages', 'demand', 'failed'],
  ['has every page', 'all', 'complete'],
])('an image whose root is no peer any more, and that %s (%s), ends as %s', async (_, fetch, state) => {
  const image = { state: 'filling', deviceStateBytes: 5 };
  const isCut = state === 'failed';
  const here = scene({ request: { origin: ORIGIN, fetch }, state: 'committed', image, isCut, isRootRemoved: true });
  here.root.serveImage = () => Promise.reject(new Error('nobody asks a host that is no peer'));
  if (!isCut) here.reader.state = 'complete';
  const fork = here.session();
  await fork.resume();
  const problem = isCut ? { problem: expect.stringMatching(/lacks pages that only B/) } : {};
  await expect.poll(here.image, { timeout: 5_000 }).toMatchObject({ state, ...problem });
  expect(await fork.finish()).toBe('over');
});

test('a host that reads on demand is let go, goes on after a restart, and completes the image on request', async () => {
  const lazy = { origin: ORIGIN, fetch: 'demand', memory: 'cow' };
  const before = scene({ request: lazy, image: { deviceStateBytes: 5 } });
  const fork = before.session();
  await fork.connectImage('tcp');
  await fork.load();
  await fork.commit();
  expect(await fork.progress()).toMatchObject({ state: 'lazy' });
  await fork.run();
  expect(await fork.finish()).toBe('released');
  expect(before.saved.at(-1)).toMatchObject({ state: 'committed', isReleased: true });
  expect(before.calls).not.toContain('sweep');
  await fork.close();

  const after = scene({ request: lazy, image: { state: 'filling', deviceStateBytes: 5 }, state: 'committed' });
  const next = after.session();
  await next.resume();
  await expect.poll(() => after.calls).toContain('start');
  expect(after.calls).not.toContain('sweep');
  await next.completeImage();
  expect(after.calls).toContain('sweep');
  expect(after.saved.at(-1)).toMatchObject({ isCompleting: true });
});

test.each([
  ['a device that registers all memory', false],
  ['no device', null],
])('reading on demand is refused over RDMA with %s', async (_, isOnDemandPaging) => {
  const { session, context } = scene({ request: { origin: ORIGIN, fetch: 'demand' } });
  const devices = isOnDemandPaging === null ? [] : [{ isOnDemandPaging }];
  Object.assign(context, { rdma: { inventory: async () => ({ devices }) } });
  await expect(session().connectImage('rdma')).rejects.toThrow(expect.objectContaining({ code: 'UNSUPPORTED' }));
  await session().connectImage('tcp');
});

test('reading on demand is possible over RDMA with a device that pages on demand', async () => {
  const { session, context, calls } = scene({ request: { origin: ORIGIN, fetch: 'demand' } });
  Object.assign(context, { rdma: { inventory: async () => ({ devices: [{ isOnDemandPaging: true }] }) } });
  await session().connectImage('rdma');
  expect(calls).toContain('connect');
});

/** A disk of an image on host A, read on host B: real files and a real storage daemon, and no VM. */
import { execFile } from 'node:child_process';
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { DiskReader } from '../../../../../src/agent/fork/bases/disk-reader.js';
import { DiskServer } from '../../../../../src/agent/fork/bases/disk-server.js';
import type { ImageStore } from '../../../../../src/agent/image/store.js';
import { RemoteAgents } from '../../../../../src/api/peers/client.js';
import { buildServer } from '../../../../../src/api/server.js';
import { findByArgument } from '../../../../../src/kit/process.js';
import { Authority } from '../../../../../src/tls/authority.js';
import { TlsStore } from '../../../../../src/tls/store.js';
import { fakeServices } from '../../../../support/api-fakes.js';
import { ID, type ImageHost, ImageScene, write } from '../../../../support/image-scene.js';

const run = promisify(execFile);
const SILENT = { info: () => undefined, warn: () => undefined, error: () => undefined, debug: () => undefined };
const code = (expected: string) => expect.objectContaining({ code: expected });

let scene: ImageScene;
let a: ImageHost;
let server: DiskServer;
let reader: DiskReader;
let imagesOfB: ImageStore;
/** How B connects to a disk of A. */
let openDisk: (host: string, image: string, disk: string) => Promise<Duplex>;
let sockets: Readonly<Record<string, string>>;

beforeEach(async () => {
  scene = new ImageScene();
  a = await scene.contextOn('A');
  await scene.forked(a);
  server = await start();
  const { record, images } = await joined();
  imagesOfB = images;
  openDisk = (_, image, disk) => server.open(image, disk, 'B');
  const peers: { openDisk: typeof openDisk } = { openDisk: (...args) => openDisk(...args) };
  reader = new DiskReader({ images, peers, log: SILENT } as never, join(scene.directory, 'B'));
  await reader.start();
  sockets = await reader.open(record, new AbortController().signal);
});
afterEach(async () => {
  await reader.close();
  await server.close();
  await scene.end();
});

async function start(): Promise<DiskServer> {
  const { images, vms } = a.context;
  const made = new DiskServer({ host: 'A', images, vms, log: SILENT }, join(scene.directory, 'A'));
  await made.start();
  return made;
}

/** The record of the image on B. */
async function joined() {
  const { images } = (await scene.contextOn('B')).context;
  const { overlays: _, layers: __, ...record } = a.context.images.get(ID);
  await images.create({ ...record, overlays: [], served: { host: 'A', disks: ['d0', 'cd'] } }, null);
  return { images, record: images.get(ID) };
}

const daemons = () =>
  findByArgument(
    `addr.type=unix,addr.path=${join(scene.directory, 'A', 'disk-server', `${ID}.sock`)},max-connections=0`,
  );

/** What a guest has written to a served disk (`write`), and what is in its backing file. */
async function read(disk = 'd0'): Promise<string> {
  const copy = join(scene.directory, 'copy.raw');
  const url = `nbd+unix:///${disk}?socket=${sockets[disk] ?? ''}`;
  await run('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', url, copy], { timeout: 20_000 });
  const content = readFileSync(copy).toString('latin1');
  return disk === 'd0' ? `${content.charAt(65_536)} ${content.slice(0, 6)}` : content.slice(0, 3);
}

test('it is read as the guest sees it, by one process, which ends with its readers', async () => {
  expect([await read(), await read('cd')]).toEqual(['f golden', 'iso']);
  expect(a.context.images.get(ID).servedTo).toEqual(['B']);
  expect(await daemons()).toHaveLength(1);
  await expect.poll(daemons, { timeout: 10_000 }).toEqual([]);
  expect(await read()).toBe('f golden');
});

test('its sockets and directories are private', async () => {
  await read();
  const directories = [join(scene.directory, 'A', 'disk-server'), join(scene.directory, 'B', 'disk-reader')] as const;
  for (const directory of directories) expect(statSync(directory).mode & 0o777).toBe(0o700);
  for (const name of readdirSync(directories[0])) expect(statSync(join(directories[0], name)).mode & 0o777).toBe(0o600);
  // The clones of the image, whose users are not this one, see the image's own directory.
  const [index = ''] = readdirSync(join(directories[1], ID));
  expect(statSync(join(directories[1], ID, index)).isSocket()).toBe(true);
});

test('what was read before the fork point is read again', async () => {
  const { images } = a.context;
  await server.whileUnserved(ID, () => images.update(ID, { state: 'capturing', deviceStateBytes: 0, layers: [] }));
  const open = await server.open(ID, 'd0', 'B');
  const [first] = await daemons();
  // The parent may write: the files are not locked.
  write(scene.disk, 'later');
  await images.update(ID, { deviceStateBytes: 5 });
  const isGone = new Promise((resolve) => open.once('close', resolve));
  open.resume();
  await server.fix(ID);
  await isGone;
  expect(await daemons()).toEqual([]);
  expect(await read()).toBe('l golden');
  const [second] = await daemons();
  expect([second?.pid === undefined, second?.pid === first?.pid]).toEqual([false, false]);
  // From now on it is left alone.
  await server.fix(ID);
  expect(await daemons()).toEqual([second]);
  expect(() => write(scene.disk, 'again')).toThrow();
});

test('its files change only while nobody reads them', async () => {
  await read();
  let opening: Promise<string> | null = null;
  await server.whileUnserved(ID, async () => {
    expect(await daemons()).toEqual([]);
    opening = read();
    write(scene.disk, 'merged');
  });
  // The image would have been removed.
  await expect(opening).rejects.toThrow();
  await expect(server.open(ID, 'd0', 'B')).rejects.toThrow(code('DISK_CHANGED'));
  await a.context.images.delete(ID);
  await expect(server.open(ID, 'd0', 'B')).rejects.toThrow(code('NOT_FOUND'));
});

test('nothing else is served', async () => {
  await expect(server.open(ID, 'other', 'B')).rejects.toThrow(code('NOT_FOUND'));
  await expect(server.open('b'.repeat(16), 'd0', 'B')).rejects.toThrow(code('NOT_FOUND'));
  await a.context.images.update(ID, { served: { host: 'C', disks: ['d0'] } });
  await expect(server.open(ID, 'd0', 'B')).rejects.toThrow(code('NOT_FOUND'));
});

test('the next daemon ends what a killed one has left, and serves', async () => {
  await server.open(ID, 'd0', 'B');
  const [left] = await daemons();
  // The first one is not closed: it was killed.
  const killed = server;
  server = await start();
  expect(await daemons()).toEqual([]);
  expect(await read()).toBe('f golden');
  expect((await daemons())[0]?.pid).not.toBe(left?.pid);
  await killed.close();
});

test('the sockets go with their image', async () => {
  await imagesOfB.delete(ID);
  await expect.poll(() => readdirSync(join(scene.directory, 'B', 'disk-reader')), { timeout: 15_000 }).toEqual([]);
});

test('it is read over mutual TLS, and again when the daemon of its host is back', async () => {
  const at = (name: string) => join(scene.directory, name);
  const authority = await Authority.create(at('ca'), 'test');
  for (const name of ['A', 'B']) await authority.issue({ role: 'host', name }, ['127.0.0.1'], at(`tls-${name}`));
  const stores = ['A', 'B'].map((name) => new TlsStore(at(`tls-${name}`), () => undefined));
  const [tls, own] = stores as [TlsStore, TlsStore];
  const services = fakeServices({ tls });
  services.agent.forks.openDisk = (...args) => server.open(...args);
  const first = buildServer(services);
  const port = await first.listenTls('127.0.0.1', 0, tls);
  const agents = new RemoteAgents({
    ...{ self: 'B', store: own, peers: { A: `https://127.0.0.1:${port}` } },
    local: () => services.agent,
  });
  openDisk = (...args) => agents.openDisk(...args);
  expect([await read(), await read('cd')]).toEqual(['f golden', 'iso']);
  expect(a.context.images.get(ID).servedTo).toEqual(['B']);
  await first.close();
  await expect(read()).rejects.toThrow();
  await expect(reader.probe('A', ID, 'd0')).rejects.toThrow(code('UNREACHABLE'));
  const second = buildServer(services);
  await second.listenTls('127.0.0.1', port, tls);
  expect(await read()).toBe('f golden');
  agents.close();
  await second.close();
  for (const store of stores) store.close();
});

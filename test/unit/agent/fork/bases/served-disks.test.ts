/** A disk of an image on host A, read on host B: real files and a real storage daemon, and no VM. */
import { execFile } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { DiskReader } from '../../../../../src/agent/fork/bases/disk-reader.js';
import { DiskServer } from '../../../../../src/agent/fork/bases/disk-server.js';
import { findByArgument } from '../../../../../src/kit/process.js';
import { ID, type ImageHost, ImageScene, write } from '../../../../support/image-scene.js';

const run = promisify(execFile);
const SILENT = { info: () => undefined, warn: () => undefined, error: () => undefined, debug: () => undefined };
const code = (expected: string) => expect.objectContaining({ code: expected });

let scene: ImageScene;
let a: ImageHost;
let server: DiskServer;
let reader: DiskReader;
let sockets: Readonly<Record<string, string>>;

beforeEach(async () => {
  scene = new ImageScene();
  a = await scene.contextOn('A');
  await scene.forked(a);
  server = await start();
  const { record, images } = await joined();
  const peers = { openDisk: (_: string, image: string, disk: string) => server.open(image, disk, 'B') };
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
  for (const directory of [join(scene.directory, 'A', 'disk-server'), join(scene.directory, 'B', 'disk-reader')]) {
    expect(statSync(directory).mode & 0o777).toBe(0o700);
    for (const name of readdirSync(directory)) expect(statSync(join(directory, name)).mode & 0o777).toBe(0o600);
  }
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

test('a socket goes with its image', async () => {
  const path = sockets['d0'] ?? '';
  expect(existsSync(path)).toBe(true);
  await reader.close();
  expect(existsSync(path)).toBe(false);
});

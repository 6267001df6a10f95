/** Images on disk: records, budget, references by clones, and the file to which an image can be saved. */
import { execFileSync } from 'node:child_process';
import { closeSync, openSync, truncateSync } from 'node:fs';
import { access, mkdir, mkdtemp, open, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { DiskServer } from '../../../../src/agent/fork/bases/disk-server.js';
import type { ForkContext } from '../../../../src/agent/fork/context.js';
import { Images } from '../../../../src/agent/fork/image-calls.js';
import { ImageServers } from '../../../../src/agent/fork/pages/image-servers.js';
import { loadImage } from '../../../../src/agent/image/file-load.js';
import { saveImage } from '../../../../src/agent/image/file-save.js';
import type { ImageRecord } from '../../../../src/agent/image/record.js';
import { ImageStore } from '../../../../src/agent/image/store.js';
import { MemoryRoom } from '../../../../src/agent/vm/memory-room.js';
import { RamPlace } from '../../../../src/agent/vm/ram-place.js';
import { NOTHING_ALLOWED } from '../../../../src/domain/policy.js';
import type { RegionFile } from '../../../../src/native/types.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

const MIB = 1 << 20;
const [FIRST, SECOND] = ['1'.repeat(16), '2'.repeat(16)];
const code = (expected: string) => expect.objectContaining({ code: expected });

let directory: string;
let vms: { spec: { name: string }; image: string; state: string }[];
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-images-'));
  vms = [];
});
const places: RamPlace[] = [];
afterEach(async () => {
  for (const place of places.splice(0)) await place.close();
  await rm(directory, { recursive: true, force: true });
});

function createRegionFile({ path, lengthBytes }: RegionFile): void {
  closeSync(openSync(path, 'wx'));
  truncateSync(path, Number(lengthBytes));
}

function record(change: Partial<ImageRecord> = {}): ImageRecord {
  return {
    version: 1,
    id: FIRST,
    state: 'complete',
    parentMode: 'continue',
    spec: {
      ...parseSpec({ name: 'web', memory: { regions: [{ size: '16M' }, { size: '32M' }] } }),
      machine: 'pc-q35-7.2',
    },
    accel: 'tcg',
    qemuVersion: '7.2.22',
    deviceStateBytes: 5,
    disks: [],
    overlays: [],
    createdAt: '2026-01-01T00:00:00.000Z',
    ...change,
  };
}

const silent = { info: () => undefined, warn: () => undefined, error: () => undefined };

const backend = { installed: async () => ({ machines: ['pc-q35-7.2'], version: '7.2.22' }), filesIn: () => [] };

async function openStore(name: string, budgetBytes: number | null = null): Promise<ImageStore> {
  const stateDir = join(directory, name);
  const place = new RamPlace({ host: name, ramDir: join(stateDir, 'ram') });
  places.push(place);
  await mkdir(place.ramDir, { recursive: true });
  const manager = { place, room: new MemoryRoom(place), all: () => vms, backend };
  return ImageStore.open({
    ...{ host: name, stateDir, budgetBytes, log: silent },
    vms: manager as never,
    native: { createRegionFile } as never,
  });
}

async function contextOn(name: string): Promise<ForkContext> {
  const images = await openStore(name);
  const manager = { all: () => vms, unreadable: () => [], backend };
  const diskServer = new DiskServer({ host: name, images, vms: manager, log: silent } as never, join(directory, name));
  const own = { host: name, policy: NOTHING_ALLOWED, signer: null, log: silent };
  return { ...own, images, vms: manager, servers: new ImageServers({ images } as never), diskServer } as never;
}

/** An image with device state, and with bytes at the ends of both regions. */
async function filled(images: ImageStore, id = FIRST): Promise<void> {
  await images.create(record({ id }), null);
  await writeFile(images.statePath(id), 'state');
  for (const { path, lengthBytes } of await images.regions(images.get(id))) {
    const file = await open(path, 'r+');
    await file.write(Buffer.from('first'), 0, 5, 0);
    await file.write(Buffer.from('last!'), 0, 5, Number(lengthBytes) - 5);
    await file.close();
  }
}

describe('the store', () => {
  test('finds images of an earlier daemon again, and removes what no record names', async () => {
    const before = await openStore('A');
    await filled(before);
    const stray = join(directory, 'A/ram/.images', SECOND);
    await mkdir(stray);
    const after = await openStore('A');
    expect(after.list()).toMatchObject([{ id: FIRST, state: 'complete', memoryBytes: 48 * MIB, clones: [] }]);
    await expect(access(stray)).rejects.toThrow('ENOENT');
    await after.delete(FIRST);
    expect(await readdir(join(directory, 'A/images'))).toEqual([]);
    expect(await readdir(join(directory, 'A/ram'))).toEqual([]);
  });

  test('does not write a record anew that is being deleted', async () => {
    const images = await openStore('A');
    await filled(images);
    const deleting = images.delete(FIRST);
    const late: Promise<unknown>[] = [];
    while (images.has(FIRST)) {
      late.push(images.update(FIRST, { readers: ['B'] }).catch((error: unknown) => error));
      await new Promise(setImmediate);
    }
    await deleting;
    expect(await Promise.all(late)).toContainEqual(code('NOT_FOUND'));
    expect(await readdir(join(directory, 'A/images'))).toEqual([]);
  });

  test('forgets an image whose memory is gone, as after a reboot', async () => {
    await filled(await openStore('A'));
    await rm(join(directory, 'A/ram'), { recursive: true });
    expect((await openStore('A')).list()).toEqual([]);
    expect(await readdir(join(directory, 'A/images'))).toEqual([]);
  });

  test('leaves everything alone where a record cannot be read', async () => {
    await filled(await openStore('A'));
    await writeFile(join(directory, 'A/images', `${FIRST}.json`), '{"version":1}');
    expect((await openStore('A')).list()).toEqual([]);
    await access(join(directory, 'A/ram/.images', FIRST, 'ram0.ram'));
  });

  test('counts what images take against the budget, and what one that is being filled may come to', async () => {
    const images = await openStore('A', 100 * MIB);
    const freeBytes = await images.bytesFree();
    expect(freeBytes).toBe(100 * MIB);
    await filled(images);
    const allocatedBytes = images.view(FIRST).allocatedBytes;
    expect(allocatedBytes).toBeGreaterThan(0);
    expect(await images.bytesFree()).toBe(freeBytes - allocatedBytes);
    await images.update(FIRST, { state: 'filling' });
    expect(await images.bytesFree()).toBe(freeBytes - 48 * MIB);
  });
});

test('an image with clones, or one that a fork needs, is not removed', async () => {
  const context = await contextOn('A');
  await filled(context.images);
  const claimed = new Set<string>();
  const images = new Images(context, (id) => claimed.has(id));
  vms.push({ spec: { name: 'clone' }, image: FIRST, state: 'running' });
  await expect(images.remove(FIRST)).rejects.toEqual(code('CONFLICT'));
  expect(images.find(FIRST).clones).toEqual(['clone']);
  vms[0]!.state = 'stopped';
  claimed.add(FIRST);
  await expect(images.remove(FIRST)).rejects.toEqual(code('CONFLICT'));
  claimed.clear();
  await images.remove(FIRST);
  expect(images.list()).toEqual([]);
  await expect(images.remove(FIRST)).rejects.toEqual(code('NOT_FOUND'));
});

describe('a saved image', () => {
  const file = () => join(directory, 'saved.img');

  async function saved(): Promise<number> {
    const context = await contextOn('A');
    await filled(context.images);
    return (await saveImage(context, FIRST, file())).fileBytes;
  }

  test('is loaded on another host as it was, without the zeros', async () => {
    const fileBytes = await saved();
    expect(fileBytes).toBeLessThan(5 * MIB);
    expect((await readFile(file())).length).toBe(fileBytes);
    const target = await contextOn('B');
    expect(await loadImage(target, file())).toBe(FIRST);
    const { images } = target;
    expect(images.view(FIRST)).toMatchObject({ state: 'complete', deviceStateBytes: 5, parent: 'web' });
    expect(await readFile(images.statePath(FIRST), 'utf8')).toBe('state');
    const source = await (await openStore('A')).regions(record());
    for (const [index, { path }] of (await images.regions(record())).entries()) {
      expect((await readFile(path)).equals(await readFile(source[index]!.path))).toBe(true);
    }
    await expect(loadImage(target, file())).rejects.toEqual(code('CONFLICT'));
  });

  test('does not replace a file, and leaves none behind when it cannot be made', async () => {
    await saved();
    await expect(saveImage(await contextOn('A'), FIRST, file())).rejects.toEqual(code('CONFLICT'));
    await expect(saveImage(await contextOn('A'), FIRST, 'saved.img')).rejects.toEqual(code('USAGE'));
    expect((await readdir(directory)).filter((name) => name.endsWith('.part'))).toEqual([]);
  });

  test('is not read from a pipe, nor does anybody wait for its writer', async () => {
    execFileSync('mkfifo', [file()]);
    await expect(loadImage(await contextOn('B'), file())).rejects.toEqual(code('USAGE'));
    await rm(file());
    await expect(loadImage(await contextOn('B'), file())).rejects.toEqual(code('NOT_FOUND'));
  });

  test('that was changed or cut anywhere is refused, and leaves nothing', async () => {
    const fileBytes = await saved();
    const target = await contextOn('B');
    const good = await readFile(file());
    // Of the head, the first entry's header and the end all words, and places anywhere.
    const places = [
      ...Array.from({ length: 24 }, (_, index) => index * 3),
      ...Array.from({ length: 12 }, (_, index) => 72 + ((index * 7_919_003) % (fileBytes - 132))),
      ...Array.from({ length: 15 }, (_, index) => fileBytes - 60 + index * 4),
    ];
    for (const place of places) {
      const bad = Buffer.from(good);
      bad[place]! ^= 1 << (place % 8);
      await writeFile(file(), bad);
      await expect(loadImage(target, file()), `byte ${place}`).rejects.toMatchObject({
        code: expect.stringMatching(/^(CORRUPT|SPEC_INVALID)$/),
      });
    }
    await writeFile(file(), good);
    for (const lengthBytes of [0, 10, 40, 1000, MIB, fileBytes - 56, fileBytes - 1]) {
      await writeFile(file(), good);
      await truncate(file(), lengthBytes);
      await expect(loadImage(target, file()), `${lengthBytes} bytes`).rejects.toMatchObject({
        code: expect.stringMatching(/^(CORRUPT|SPEC_INVALID)$/),
      });
    }
    await writeFile(file(), Buffer.concat([good, Buffer.from('x')]));
    await expect(loadImage(target, file())).rejects.toEqual(code('CORRUPT'));
    expect(target.images.list()).toEqual([]);
    expect(await readdir(join(directory, 'B/images'))).toEqual([]);
  });
});

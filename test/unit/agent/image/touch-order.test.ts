import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { readdir, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { OriginHost } from '../../../../src/agent/fork/pages/origin-host.js';
import { TouchKeeper } from '../../../../src/agent/fork/pages/touch-keeper.js';
import { ENTRY, ENTRY_HEADER_BYTES, encodeEntry, HEAD_BYTES } from '../../../../src/agent/image/file-format.js';
import {
  decodeTouchOrder,
  encodeTouchOrder,
  mergeOrders,
  TOUCH_ORDER_BYTES_MAX,
  TouchOrders,
} from '../../../../src/agent/image/touch-order.js';
import { CONSTANTS } from '../../../../src/protocol/wire.js';
import { ID, ImageScene } from '../../../support/image-scene.js';

const MIB = 1024 * 1024;
/** 256 clusters, and three: the last one is not whole. */
const memory = { regions: [16 * MIB, 2.5 * 65_536].map((lengthBytes, index) => ({ id: `r${index}`, lengthBytes })) };
const order = Uint32Array.from([7, 258, 0, 255]);
const orders = (...all: number[][]) => all.map((numbers) => Uint32Array.from(numbers));

let directory: string;
let warnings: string[];
let store: TouchOrders;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'vmg-touch-'));
  mkdirSync(join(directory, 'images'));
  warnings = [];
  store = new TouchOrders({
    stateDir: directory,
    log: { warn: (_: object, text: string) => warnings.push(text) } as never,
  });
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));
const image = { id: ID, spec: { memory } } as never;

/** Corrects the checksum, as somebody would who means harm. */
function sealed(bytes: Buffer): Buffer {
  const content = bytes.subarray(0, -32);
  return Buffer.concat([content, createHash('sha256').update(content).digest()]);
}

test('an order is read as it was written, also the longest one', () => {
  expect(decodeTouchOrder(memory, encodeTouchOrder(memory, order))).toEqual(order);
  const large = { regions: [{ id: 'ram', lengthBytes: 5 * 1024 * MIB }] };
  const longest = Uint32Array.from({ length: CONSTANTS.TOUCH_CLUSTERS_MAX }, (_, index) => index + 9);
  const bytes = encodeTouchOrder(large, longest);
  expect(bytes).toHaveLength(TOUCH_ORDER_BYTES_MAX);
  expect(decodeTouchOrder(large, bytes)).toEqual(longest);
});

test('what was changed anywhere, cut or made longer is no order', () => {
  const good = encodeTouchOrder(memory, order);
  for (let place = 0; place < good.length; place++) {
    const bad = Buffer.from(good);
    bad[place]! ^= 1;
    expect(decodeTouchOrder(memory, bad), `byte ${place}`).toBeNull();
    expect(decodeTouchOrder(memory, good.subarray(0, place)), `${place} bytes`).toBeNull();
  }
  expect(decodeTouchOrder(memory, Buffer.concat([good, Buffer.alloc(4)]))).toBeNull();
  expect(decodeTouchOrder(memory, Buffer.alloc(2 * TOUCH_ORDER_BYTES_MAX))).toBeNull();
});

test('an order with a good checksum that names a cluster twice, or one that does not exist, is none', () => {
  for (const numbers of orders([1, 2, 1], [259], [0xff_ff_ff_ff])) {
    expect(decodeTouchOrder(memory, encodeTouchOrder(memory, numbers))).toBeNull();
  }
  const other = { regions: memory.regions.slice(0, 1) };
  expect(decodeTouchOrder(other, encodeTouchOrder(memory, orders([1])[0]!)), 'of another image').toBeNull();
  for (const [offset, number] of [
    [8, 2],
    [12, 4096],
    [20, 3],
    [20, 0xff_ff_ff_ff],
  ] as const) {
    const bad = encodeTouchOrder(memory, order);
    bad.writeUInt32LE(number, offset);
    expect(decodeTouchOrder(memory, sealed(bad)), `${number} at ${offset}`).toBeNull();
  }
});

test('orders are merged: the first ones first, each cluster once, and no more than fit', () => {
  expect(mergeOrders()).toEqual(Uint32Array.from([]));
  expect([...mergeOrders(...orders([], [3, 1], [1, 2, 3, 0]))]).toEqual([3, 1, 2, 0]);
  const most = Uint32Array.from({ length: CONSTANTS.TOUCH_CLUSTERS_MAX }, (_, index) => index);
  expect(mergeOrders(...orders([70_000, 5]), most)).toHaveLength(CONSTANTS.TOUCH_CLUSTERS_MAX);
});

test('the file of an image is kept, counted and removed; a damaged one is not used, with a warning', async () => {
  expect([...(await store.read(image))]).toEqual([]);
  expect(warnings).toEqual([]);
  await store.write(image, order);
  expect(await readdir(join(directory, 'images'))).toEqual([`${ID}.touched`]);
  const next = new TouchOrders({ stateDir: directory, log: { warn: () => undefined } as never });
  expect(await next.read(image)).toEqual(order);
  expect(next.count(ID)).toBe(4);
  for (const bad of [Buffer.alloc(0), Buffer.alloc(100, 'x'), Buffer.alloc(4 * MIB)]) {
    writeFileSync(store.path(ID), bad);
    expect(await store.read(image)).toHaveLength(0);
    expect(existsSync(store.path(ID))).toBe(false);
  }
  expect(warnings).toHaveLength(3);
  expect(store.count(ID)).toBe(0);
  await store.write(image, order);
  await store.remove(ID);
  expect(await readdir(join(directory, 'images'))).toEqual([]);
});

test('a directory that cannot be written to costs the order and nothing else', async () => {
  rmSync(join(directory, 'images'), { recursive: true });
  await store.write(image, order);
  await store.remove(ID);
  expect(await store.read(image)).toHaveLength(0);
  expect(warnings).toHaveLength(1);
});

test('a session keeps what it and its predecessors have seen, and what the root has told comes last', async () => {
  let seen = Uint32Array.from([5, 6]);
  const keeper = new TouchKeeper({ orders: store }, image, { before: order, read: () => seen });
  expect([...keeper.order]).toEqual([7, 258, 0, 255, 5, 6]);
  keeper.tell(Uint32Array.from([9, 5]));
  keeper.carry();
  seen = Uint32Array.from([1]);
  expect([...keeper.order]).toEqual([7, 258, 0, 255, 5, 6, 1, 9]);
  await keeper.close({ isLost: false });
  expect([...(await store.read(image))]).toEqual([7, 258, 0, 255, 5, 6, 1, 9]);
  await store.remove(ID);
  await new TouchKeeper({ orders: store }, image, { before: order, read: () => seen }).close({ isLost: true });
  expect(existsSync(store.path(ID))).toBe(false);
});

test.each([
  ['an order', encodeTouchOrder(memory, order).toString('base64'), 4, 0],
  ['none', '', 0, 0],
  ['something else', Buffer.from('an order').toString('base64'), 0, 1],
  ['an error', null, 0, 0],
])('a host that answers with %s is believed no more than that', async (_, answer, count, warned) => {
  const touchOrder = async () => {
    if (answer === null) throw new Error('unknown call');
    return { order: answer };
  };
  const quiet = () => undefined;
  const context = {
    ...{ host: 'B', images: { get: () => image }, peers: { agent: () => ({ fanout: { touchOrder } }) } },
    log: { warn: (__: object, text: string) => warnings.push(text), debug: quiet },
  };
  expect(await new OriginHost(context as never, { host: 'A', image: ID }).touchOrder()).toHaveLength(count);
  expect(warnings).toHaveLength(warned);
});

test('a saved image has its order, wherever it is loaded; a file without one is as before', async () => {
  const scene = new ImageScene();
  try {
    const host = await scene.contextOn('A');
    await scene.forked(host);
    const plain = join(scene.directory, 'plain.img');
    await host.images.save(ID, plain);
    expect((await readFile(plain)).readUInt32LE(8)).toBe(2);
    const numbers = Uint32Array.from([200, 3, 17]);
    await host.context.images.orders.write(host.context.images.get(ID), numbers);
    expect(host.images.find(ID).touchedClusters).toBe(3);
    const file = join(scene.directory, 'touched.img');
    await host.images.save(ID, file);
    const good = await readFile(file);
    expect(good.readUInt32LE(8)).toBe(2 + 256);

    const { images, context } = await scene.contextOn('B');
    expect((await images.load(file)).touchedClusters).toBe(3);
    expect(await context.images.touchOrder(ID)).toEqual(numbers);
    expect(await (await scene.contextOn('B')).context.images.touchOrder(ID)).toEqual(numbers);
    await images.remove(ID);
    expect(await readdir(join(scene.directory, 'B/images'))).toEqual([]);
    expect((await images.load(plain)).touchedClusters).toBe(0);
    await images.remove(ID);

    // An entry that was made by somebody who knows the format: the file is whole, and its order nonsense.
    const { spec } = host.context.images.get(ID);
    const length = encodeTouchOrder(spec.memory, numbers).length;
    const at = HEAD_BYTES + ENTRY_HEADER_BYTES + good.readUInt32LE(12) + ENTRY_HEADER_BYTES + 'state'.length;
    expect(good.readUInt32LE(at)).toBe(ENTRY.TOUCH_ORDER);
    const nonsense = Buffer.alloc(length, 'x');
    const header = { kind: ENTRY.TOUCH_ORDER, region: 0, offsetBytes: 0, lengthBytes: length };
    const entry = Buffer.concat([encodeEntry(header, nonsense), nonsense]);
    await writeFile(file, Buffer.concat([good.subarray(0, at), entry, good.subarray(at + entry.length)]));
    expect((await images.load(file)).touchedClusters).toBe(0);
    await images.remove(ID);
    const flipped = Buffer.from(good);
    flipped[at + ENTRY_HEADER_BYTES + 9]! ^= 1;
    await writeFile(file, flipped);
    await expect(images.load(file)).rejects.toMatchObject({ code: 'CORRUPT' });
    // In a file whose version does not allow it, the entry is misplaced.
    const undeclared = Buffer.from(good);
    undeclared.writeUInt32LE(2, 8);
    await writeFile(file, undeclared);
    await expect(images.load(file)).rejects.toMatchObject({ code: 'CORRUPT' });
    expect(await readdir(join(scene.directory, 'B/images'))).toEqual([]);
  } finally {
    await scene.end();
  }
});

/**
 * The native interface of cloning: a parent and clones in processes of their own, and an image captured through the
 * addon and closed in every order.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { loadNativeBinding } from '../../src/native/binding.js';
import type { ImageCaptureHandle, VmMemoryHandle, VmMemorySnapshot } from '../../src/native/types.js';
import { CONSTANTS } from '../../src/protocol/wire.js';
import { expectToWait, FakeVm, openSource, Scene, until } from '../support/fake-vm.js';

const childProgram = fileURLToPath(new URL('../support/addon-child.ts', import.meta.url));
const binding = loadNativeBinding();
const LENGTHS_MIB = [8, 2];
const PAGES = ((LENGTHS_MIB[0]! + LENGTHS_MIB[1]!) << 20) / 4096;
let scene: Scene;

beforeEach(() => {
  scene = new Scene();
});
afterEach(async () => {
  await scene.dispose();
});

/** A VM on files with the pattern, as QEMU runs it: mapped shared, and not registered. */
async function startParent() {
  const regions = await scene.filledRegions('ram', LENGTHS_MIB);
  const socketPath = scene.path('parent.sock');
  const memory = binding.listenForVm({ socketPath, regions, isIncoming: false, onEdge: () => undefined });
  const vm = FakeVm.withPreload(socketPath, regions);
  scene.later(async () => vm.kill());
  expect(await vm.mapAll(regions)).toEqual(['mapped 0', 'mapped 1']);
  return { regions, memory, vm };
}

function makeImage(side = 'image') {
  const regions = scene.withPresence(scene.regions(side, LENGTHS_MIB));
  for (const region of regions) binding.createRegionFile(region);
  return regions;
}

async function startClone(number: number, side = 'image') {
  const regions = scene.regions(side, LENGTHS_MIB).map((region) => ({ ...region, isPrivate: true }));
  const socketPath = scene.path(`${side}${number}.sock`);
  const memory = binding.listenForVm({ socketPath, regions, isIncoming: true, onEdge: () => undefined });
  const vm = FakeVm.withPreload(socketPath, regions);
  scene.later(async () => vm.kill());
  expect(await vm.mapAll(regions)).toEqual(['mapped 0', 'mapped 1']);
  return { regions, memory, vm };
}

async function startCapture() {
  const parent = await startParent();
  const image = makeImage();
  let edgeCount = 0;
  const open = (memory: VmMemoryHandle | null, isResume: boolean): ImageCaptureHandle =>
    binding.openImageCapture({ parent: memory, source: parent.regions, image, isResume, onEdge: () => edgeCount++ });
  return { parent, image, open, edges: () => edgeCount, capture: open(parent.memory, false) };
}

describe('an image of a running VM', () => {
  test('clones see the fork point, the parent goes on, nobody is left registered', async () => {
    const { parent, capture, edges } = await startCapture();
    const clones = [await startClone(0), await startClone(1)];
    for (const { memory } of clones) capture.addClone(memory);
    expect(capture.snapshot()).toMatchObject({ state: 'idle', failure: null });
    await capture.arm();
    expect(await parent.vm.ask('poke 0 0 77')).toBe('poked');
    await capture.protect();
    await capture.seal();
    expect(await parent.vm.ask('poke 0 4096 78')).toBe('poked');
    await until('complete', () => capture.snapshot().state === 'complete');
    await until('an edge', () => edges() > 0);
    for (const { vm, regions } of clones) {
      expect(await vm.ask('touch 0 0')).toBe('byte 77');
      expect(await vm.ask('poke 0 8192 5')).toBe('poked');
      // All pages except the page that the parent wrote before the fork point, and the clone's own page.
      expect(await vm.badPages(regions)).toEqual([2, 0]);
    }
    const { counters } = capture.snapshot();
    expect(counters.pagesTotal).toBe(BigInt(PAGES));
    expect(counters.pagesCopied + counters.pagesZero).toBe(BigInt(PAGES));
    expect(counters.pagesZero).toBeGreaterThan(0n);
    expect(counters.notedFaultCount).toBe(1n);
    await capture.close();
    expect(capture.snapshot().counters).toEqual(counters);
    // None of the clones needs the daemon any more.
    for (const { memory } of [...clones, parent]) memory.close();
    expect(await parent.vm.ask('poke 1 4096 1')).toBe('poked');
    expect(await clones[1]!.vm.ask('touch 1 4096')).not.toBe('byte 0');
  });

  test('left in the middle, it is gone on with by another capture', async () => {
    const { parent, capture, open } = await startCapture();
    await capture.arm();
    await capture.seal();
    await capture.leave();
    const { memory, vm, regions } = await startClone(0);
    const next = open(parent.memory, true);
    await next.resume();
    next.addClone(memory);
    expect(await vm.badPages(regions)).toEqual([0, 0]);
    await until('complete', () => next.snapshot().state === 'complete');
    await next.close();
  });

  test('a VM whose image is given up runs on', async () => {
    const { parent, capture } = await startCapture();
    await capture.arm();
    await capture.leave();
    const write = parent.vm.ask('poke 0 0 1');
    await expectToWait(write);
    await binding.releaseVm(parent.memory);
    expect(await write).toBe('poked');
  });

  test('an image that is complete needs no parent to serve clones', async () => {
    const { capture, open } = await startCapture();
    await capture.arm();
    await capture.seal();
    await until('complete', () => capture.snapshot().state === 'complete');
    await capture.close();
    const next = open(null, true);
    const { memory, vm, regions } = await startClone(0);
    next.addClone(memory);
    await next.resume();
    expect(await vm.badPages(regions)).toEqual([0, 0]);
    await until('complete', () => next.snapshot().state === 'complete');
    await next.close();
  });
});

describe('an image on a second host', () => {
  const fetchOf = (isResume: boolean) => {
    const image = isResume ? scene.withPresence(scene.regions('leaf', LENGTHS_MIB)) : makeImage('leaf');
    return binding.openImageFetch({ image, digests: null, bandwidthBytesPerS: 0, isResume, onEdge: () => undefined });
  };

  test('is read from one that is still being captured, and its clones see the fork point', async () => {
    const { parent, image, capture } = await startCapture();
    const fetch = fetchOf(false);
    const clones = [await startClone(0, 'leaf'), await startClone(1, 'leaf')];
    for (const { memory } of clones) fetch.addClone(memory);
    await expect(openSource(binding, scene, 'shm', image, { image: capture })).rejects.toMatchObject({
      code: 'UNSUPPORTED',
    });
    const { listener, session, address } = await openSource(binding, scene, 'tcp', image, { image: capture });
    expect(() => fetch.start()).toThrow(expect.objectContaining({ code: 'USAGE' }));
    await fetch.connect(address, 5000);
    await capture.arm();
    expect(await parent.vm.ask('poke 0 0 77')).toBe('poked');
    await capture.seal({ isSweepLater: true });
    expect(await parent.vm.ask('poke 0 4096 78')).toBe('poked');
    session.scan();
    fetch.start();
    expect(await clones[0]!.vm.ask('touch 0 0')).toBe('byte 77');
    expect([...fetch.touched()]).toEqual([0]);
    expect([...capture.touched()], 'what other hosts read counts there').toEqual([]);
    const tooLong = new Uint32Array(CONSTANTS.TOUCH_CLUSTERS_MAX + 1);
    const usage = expect.objectContaining({ code: 'USAGE' });
    for (const order of [tooLong, [3] as never]) expect(() => fetch.sweep(order)).toThrow(usage);
    fetch.sweep(Uint32Array.from([0xff_ff_ff_ff, 3, 3, 0]));
    for (const { vm, regions } of clones) expect(await vm.badPages(regions)).toEqual([1, 0]);
    await until('complete', () => fetch.snapshot().state === 'complete');
    const { counters } = fetch.snapshot();
    expect(counters.pagesCopied + counters.pagesZero).toBe(BigInt(PAGES));
    expect(counters.demandBytes + counters.prefetchBytes).toBe(counters.copiedBytes);
    await fetch.close();
    expect(fetch.snapshot()).toMatchObject({ state: 'closed', counters });
    expect([...fetch.touched()]).toEqual([]);
    await session.close();
    await capture.close();
    listener.close();
    for (const { memory } of [...clones, parent]) memory.close();
    // Only pages that were read are in the image of the root: nobody has swept it.
    expect(await clones[1]!.vm.ask('touch 1 4096')).not.toBe('byte 0');
  });

  test('reads on from another holder when the first is gone, also in another life of its daemon', async () => {
    const files = await scene.filledRegions('ram', LENGTHS_MIB);
    const first = await openSource(binding, scene, 'tcp', files);
    const fetch = fetchOf(false);
    const { memory, vm, regions } = await startClone(0, 'leaf');
    fetch.addClone(memory);
    await fetch.connect(first.address, 5000);
    first.session.scan();
    fetch.start();
    expect(await vm.ask('touch 1 4096')).not.toBe('byte 0');
    await first.session.close();
    first.listener.close();
    await until('disconnected', () => fetch.snapshot().state === 'disconnected');
    const verified = vm.badPages(regions);
    await expectToWait(verified);
    await fetch.close();
    const next = fetchOf(true);
    next.addClone(memory);
    const second = await openSource(binding, scene, 'tcp', files);
    second.session.scan();
    await next.connect(second.address, 5000);
    next.start();
    next.sweep();
    expect(await verified).toEqual([0, 0]);
    await until('complete', () => next.snapshot().state === 'complete');
    await next.close();
    await second.session.close();
    second.listener.close();
  });

  test('a clone that is served refuses to be closed, and closed handles say so', async () => {
    const fetch = fetchOf(false);
    const { memory } = await startClone(0, 'leaf');
    fetch.addClone(memory);
    const conflict = expect.objectContaining({ code: 'CONFLICT' });
    expect(() => memory.close()).toThrow(conflict);
    expect(() => fetch.addClone(memory)).toThrow(conflict);
    fetch.removeClone(memory);
    memory.close();
    await Promise.all([fetch.close(), fetch.close()]);
    expect(() => fetch.start()).toThrow(conflict);
    expect(() => fetch.sweep()).toThrow(conflict);
  });
});

describe('a daemon that ends with an image begun', () => {
  test.each([
    ['image-exit', 7],
    ['image-end', 0],
  ])('%s: code %i, the parent stays protected, and the next daemon lets it go', async (mode, code) => {
    const lengthMiB = LENGTHS_MIB[0]!;
    const regions = await scene.filledRegions('ram', [lengthMiB]);
    const input = JSON.stringify({ scene: scene.directory, lengthMiB });
    const child = spawn(process.execPath, ['--import', 'tsx', childProgram, mode, input], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    scene.later(() => child.kill('SIGKILL'));
    const exited = once(child, 'exit');
    const lines: string[] = [];
    createInterface({ input: child.stdout }).on('line', (line) => lines.push(line));
    await until('the child listens', () => lines.includes('listening'));
    const vm = FakeVm.withPreload(scene.path('preload.sock'), regions);
    scene.later(async () => vm.kill());
    expect(await vm.mapAll(regions)).toEqual(['mapped 0']);
    expect(await exited).toEqual([code, null]);
    await until('what it said last', () => lines.some((line) => line.startsWith('ready ')));
    const write = vm.ask('poke 0 0 1');
    await expectToWait(write);

    const ready = lines.find((line) => line.startsWith('ready ')) ?? '';
    const snapshot = JSON.parse(ready.slice('ready '.length), (_, value: unknown) =>
      typeof value === 'string' && /^\d+n$/.test(value) ? BigInt(value.slice(0, -1)) : value,
    ) as VmMemorySnapshot;
    const memory = binding.adoptVm({ snapshot, regions });
    await binding.releaseVm(memory);
    expect(await write).toBe('poked');
    memory.close();
  });
});

describe('handles', () => {
  test('what a capture stands on refuses to be closed; a clone that was removed does not', async () => {
    const { parent, capture } = await startCapture();
    const clone = await startClone(0);
    capture.addClone(clone.memory);
    const conflict = expect.objectContaining({ code: 'CONFLICT' });
    expect(() => parent.memory.close()).toThrow(conflict);
    expect(() => clone.memory.close()).toThrow(conflict);
    expect(() => capture.addClone(clone.memory)).toThrow(conflict);
    capture.removeClone(clone.memory);
    capture.removeClone(clone.memory);
    clone.memory.close();
    expect(() => capture.addClone(clone.memory)).toThrow(conflict);
    await Promise.all([capture.close(), capture.close()]);
    await capture.leave();
    parent.memory.close();
    expect(capture.snapshot().state).toBe('closed');
    await expect(capture.arm()).rejects.toThrow(conflict);
    expect(() => capture.addClone(parent.memory)).toThrow(conflict);
    await expect(binding.releaseVm(parent.memory)).rejects.toThrow(conflict);
  });

  test('closed while it arms and while it copies', async () => {
    const { parent, capture, open } = await startCapture();
    const arming = capture.arm().then(
      () => 'armed',
      (error: unknown) => (error as { code: string }).code,
    );
    await capture.close();
    expect(['armed', 'CONFLICT']).toContain(await arming);
    const again = open(parent.memory, false);
    await again.arm();
    await again.seal();
    await again.close();
    expect(await parent.vm.ask('poke 0 0 1')).toBe('poked');
    expect(await parent.vm.ask('poke 1 0 1')).toBe('poked');
  });

  test('calls out of turn are refused and change nothing', async () => {
    const { capture } = await startCapture();
    await expect(capture.seal()).rejects.toThrow(expect.objectContaining({ code: 'USAGE' }));
    await expect(capture.resume()).rejects.toThrow(expect.objectContaining({ code: 'USAGE' }));
    await capture.arm();
    await expect(capture.arm()).rejects.toThrow(expect.objectContaining({ code: 'USAGE' }));
    await capture.seal();
    await until('complete', () => capture.snapshot().state === 'complete');
    await capture.close();
  });
});

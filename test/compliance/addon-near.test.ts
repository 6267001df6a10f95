/** Images that hosts read from one another through the addon, while all of them fill. */
import { readFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { loadNativeBinding } from '../../src/native/binding.js';
import type { ImageFetchHandle, SourceAddress } from '../../src/native/types.js';
import { NATIVE_ERROR } from '../../src/protocol/wire.js';
import { FakeVm, openSource, Scene, until } from '../support/fake-vm.js';

const binding = loadNativeBinding();
const LENGTHS_MIB = [8, 2];
const PAGES = BigInt(((LENGTHS_MIB[0]! + LENGTHS_MIB[1]!) << 20) / 4096);
let scene: Scene;

beforeEach(() => {
  scene = new Scene();
});
afterEach(async () => {
  await scene.dispose();
});

async function openRoot() {
  const files = await scene.filledRegions('ram', LENGTHS_MIB);
  const root = await openSource(binding, scene, 'tcp', files);
  root.session.scan();
  scene.later(async () => {
    await root.session.close();
    root.listener.close();
  });
  return { ...root, files };
}

/** A host that reads from the root, and the files that it fills. */
async function startHost(name: string, root: Awaited<ReturnType<typeof openRoot>>) {
  const image = scene.withPresence(scene.regions(name, LENGTHS_MIB));
  for (const region of image) binding.createRegionFile(region);
  let edgeCount = 0;
  const onEdge = (): number => edgeCount++;
  const fetch = binding.openImageFetch({ image, digests: null, bandwidthBytesPerS: 0, isResume: false, onEdge });
  scene.later(async () => fetch.close());
  await fetch.connect(root.address, 5000);
  fetch.start();
  return { image, fetch, edges: () => edgeCount };
}

async function serve(host: Awaited<ReturnType<typeof startHost>>, provider: 'tcp' | 'shm' = 'tcp') {
  const served = await openSource(binding, scene, provider, host.image, { image: host.fetch });
  scene.later(async () => {
    await served.session.close();
    served.listener.close();
  });
  return served;
}

const isComplete = ({ fetch }: { fetch: ImageFetchHandle }): boolean => fetch.snapshot().state === 'complete';

const sameBytes = (files: readonly { path: string }[], others: readonly { path: string }[]): boolean =>
  files.every(({ path }, index) => readFileSync(path).equals(readFileSync(others[index]!.path)));

describe('an image that is read from a near holder', () => {
  test('comes from there while that fills, also to a clone that waits', async () => {
    const root = await openRoot();
    const [relay, leaf] = [await startHost('relay', root), await startHost('leaf', root)];
    const near = await serve(relay);
    expect(near.address.keys.every(({ presence }) => /^[0-9a-f]{48}$/.test(presence ?? ''))).toBe(true);
    expect(root.address.keys.every((keys) => keys.presence === undefined)).toBe(true);
    await leaf.fetch.addNear(near.address, { id: 7, level: 0 }, 5000);
    expect(leaf.fetch.nears()).toEqual([{ id: 7, level: 0, isConnected: true, bytes: 0n, failure: null }]);
    await until('the holes are known', () => leaf.fetch.snapshot().counters.pagesZero === PAGES / 4n);
    const regions = leaf.image.map((region) => ({ ...region, isPrivate: true }));
    const socketPath = scene.path('leaf.sock');
    const memory = binding.listenForVm({ socketPath, regions, isIncoming: true, onEdge: () => undefined });
    const vm = FakeVm.withPreload(socketPath, regions);
    scene.later(async () => vm.kill());
    expect(await vm.mapAll(regions)).toEqual(['mapped 0', 'mapped 1']);
    leaf.fetch.addClone(memory);
    expect(await vm.ask('touch 0 0')).not.toBe('byte 0');
    expect(leaf.fetch.snapshot().counters).toMatchObject({ absentAnswers: 1n, demandBytes: 4096n, nearBytes: 0n });
    leaf.fetch.sweep();
    relay.fetch.sweep();
    expect(await vm.badPages(regions)).toEqual([0, 0]);
    await until('both are complete', () => isComplete(leaf) && isComplete(relay));
    const { counters } = leaf.fetch.snapshot();
    expect(counters.copiedBytes).toBe((PAGES / 4n) * 3n * 4096n);
    expect(counters.nearBytes + counters.demandBytes + counters.prefetchBytes).toBe(counters.copiedBytes);
    expect(counters.nearBytes).toBeGreaterThan(counters.copiedBytes / 2n);
    expect(leaf.fetch.nears()).toMatchObject([{ id: 7, isConnected: false, bytes: counters.nearBytes, failure: null }]);
    expect(sameBytes(leaf.image, root.files)).toBe(true);
    leaf.fetch.removeClone(memory);
    memory.close();
  });

  test('goes on at the root when the holder is lost, and at the holder when it is added again', async () => {
    const root = await openRoot();
    const [relay, leaf] = [await startHost('relay', root), await startHost('leaf', root)];
    relay.fetch.sweep();
    await until('complete', () => isComplete(relay));
    const first = await openSource(binding, scene, 'tcp', relay.image, { image: relay.fetch });
    await leaf.fetch.addNear(first.address, { id: 1, level: 2 }, 5000);
    await expect(leaf.fetch.addNear(first.address, { id: 1, level: 0 }, 5000)).rejects.toMatchObject({
      code: 'CONFLICT',
    });
    const edges = leaf.edges();
    await first.session.close();
    first.listener.close();
    await until('lost', () => leaf.fetch.nears()[0]?.isConnected === false);
    expect(leaf.fetch.nears()[0]?.failure?.code).toBe(NATIVE_ERROR.DISCONNECTED);
    await until('an edge', () => leaf.edges() > edges);
    // A complete image is served also when its fetch is closed.
    const second = await serve(relay);
    await relay.fetch.close();
    await leaf.fetch.addNear(second.address, { id: 1, level: 0 }, 5000);
    expect(leaf.fetch.nears()).toMatchObject([{ id: 1, level: 0, isConnected: true, failure: null }]);
    leaf.fetch.sweep();
    await until('complete', () => isComplete(leaf));
    expect(leaf.fetch.snapshot().counters).toMatchObject({ demandBytes: 0n, prefetchBytes: 0n });
    expect(sameBytes(leaf.image, root.files)).toBe(true);
  });

  test('refuses what cannot be one', async () => {
    const root = await openRoot();
    const [relay, leaf] = [await startHost('relay', root), await startHost('leaf', root)];
    await expect(serve(relay, 'shm')).rejects.toMatchObject({ code: 'UNSUPPORTED' });
    const { address } = await serve(relay);
    const add = async (holder: SourceAddress, near = { id: 1, level: 0 }): Promise<void> =>
      leaf.fetch.addNear(holder, near, 5000);
    await expect(add(root.address)).rejects.toMatchObject({ code: 'PEER_PROTOCOL' });
    await expect(add({ ...address, keys: address.keys.slice(1) })).rejects.toMatchObject({ code: 'PEER_PROTOCOL' });
    const odd = address.keys.map((keys) => ({ ...keys, presence: keys.ram }));
    await expect(add({ ...address, keys: odd })).rejects.toMatchObject({ code: 'PEER_PROTOCOL' });
    await expect(add({ ...address, token: '0'.repeat(64) })).rejects.toThrow();
    for (const near of [
      { id: -1, level: 0 },
      { id: 1, level: 256 },
      { id: 0.5, level: 0 },
    ]) {
      await expect(add(address, near)).rejects.toMatchObject({ code: 'USAGE' });
    }
    expect(leaf.fetch.nears()).toEqual([]);
    leaf.fetch.removeNear(1);
    await add(address);
    leaf.fetch.removeNear(1);
    expect(leaf.fetch.nears()).toEqual([]);
    await leaf.fetch.close();
    await expect(add(address)).rejects.toMatchObject({ code: 'CONFLICT' });
    expect(leaf.fetch.nears()).toEqual([]);
    leaf.fetch.removeNear(1);
    await expect(serve(leaf)).rejects.toMatchObject({ code: 'CONFLICT' });
  });
});

/** The native interface of multicast: an image that several hosts read from one group, and the handles of a group. */
import { randomBytes, randomInt } from 'node:crypto';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { loadNativeBinding } from '../../src/native/binding.js';
import type { MulticastGroup } from '../../src/native/multicast-types.js';
import type { RegionFile } from '../../src/native/types.js';
import { FakeVm, openSource, Scene, until } from '../support/fake-vm.js';

const binding = loadNativeBinding();
const LENGTHS_MIB = [8, 2];
const PAGES = ((LENGTHS_MIB[0]! + LENGTHS_MIB[1]!) << 20) / 4096;
const onEdge = (): void => undefined;
let scene: Scene;

beforeEach(() => {
  scene = new Scene();
});
afterEach(async () => {
  await scene.dispose();
});

/** A group that no other test of this machine uses. */
function randomGroup(change: Partial<MulticastGroup> = {}): MulticastGroup {
  return {
    provider: 'udp',
    group: `239.${randomInt(256)}.${randomInt(256)}.${1 + randomInt(250)}`,
    port: 20_000 + randomInt(12_000),
    ...{ interfaceAddress: '127.0.0.1', ttl: 1, mtuBytes: 9000 },
    key: randomBytes(32).toString('hex'),
    session: randomBytes(8).toString('hex'),
    ...change,
  };
}

function openFetch(side: string) {
  const image = scene.withPresence(scene.regions(side, LENGTHS_MIB));
  for (const region of image) binding.createRegionFile(region);
  return binding.openImageFetch({ image, digests: null, bandwidthBytesPerS: 0, isResume: false, onEdge });
}

/** A clone on the image of that side. */
async function startClone(side: string) {
  const regions = scene.regions(side, LENGTHS_MIB).map((region) => ({ ...region, isPrivate: true }));
  const socketPath = scene.path(`${side}.sock`);
  const memory = binding.listenForVm({ socketPath, regions, isIncoming: true, onEdge });
  const vm = FakeVm.withPreload(socketPath, regions);
  scene.later(async () => vm.kill());
  expect(await vm.mapAll(regions)).toEqual(['mapped 0', 'mapped 1']);
  return { regions, memory, vm };
}

const openSender = (image: readonly RegionFile[], group: MulticastGroup, bandwidthBytesPerS = 0) =>
  binding.openMulticastSender({ image, group, bandwidthBytesPerS, onEdge });

describe('a multicast', () => {
  test('brings an image to two hosts, and each reads what it lacks from the root', async () => {
    const files = await scene.filledRegions('ram', LENGTHS_MIB);
    const root = await openSource(binding, scene, 'tcp', files);
    const group = randomGroup();
    const sides = ['one', 'two'];
    const hosts = sides.map((side) => ({ fetch: openFetch(side), side }));
    const clones = [];
    for (const [index, { fetch, side }] of hosts.entries()) {
      expect(fetch.multicast()).toMatchObject({ state: 'none', pages: 0n });
      await fetch.joinMulticast({ ...group, member: index + 1 });
      expect(fetch.multicast()).toMatchObject({ state: 'waiting', failure: null });
      await fetch.connect(root.address, 5000);
      fetch.start();
      const clone = await startClone(side);
      fetch.addClone(clone.memory);
      clones.push(clone);
    }
    root.session.scan();
    const sender = await openSender(files, group, 50_000_000);
    expect(sender.snapshot()).toMatchObject({ state: 'waiting', members: [] });
    sender.start();
    await until('the end', () => sender.snapshot().state === 'ended');
    for (const { fetch } of hosts) await until('its end', () => fetch.multicast().state === 'ended');
    const { counters, members } = sender.snapshot();
    expect(counters.sentPages).toBe(counters.pagesTotal);
    expect(counters.sentBytes).toBeGreaterThan(counters.sentPages * 4096n);
    expect(members.map(({ member }) => member).sort((a, b) => a - b)).toEqual([1, 2]);
    for (const { fetch } of hosts) {
      const got = fetch.multicast();
      expect(got.pages).toBeGreaterThan(counters.sentPages / 4n);
      // A host that has all pages does not wait for the end mark.
      expect([0n, counters.sentPages]).toContain(got.sentPages);
      fetch.sweep();
    }
    for (const [index, { fetch }] of hosts.entries()) {
      expect(await clones[index]!.vm.badPages(clones[index]!.regions)).toEqual([0, 0]);
      await until('complete', () => fetch.snapshot().state === 'complete');
      const all = fetch.snapshot().counters;
      expect(all.pagesCopied + all.pagesZero).toBe(BigInt(PAGES));
      expect(all.multicastBytes).toBe(fetch.multicast().pages * 4096n);
      expect(all.multicastBytes + all.demandBytes + all.prefetchBytes).toBe(all.copiedBytes);
      const got = fetch.multicast();
      await fetch.close();
      expect(fetch.multicast()).toEqual(got);
    }
    await sender.close();
    expect(sender.snapshot()).toMatchObject({ state: 'ended', counters: { sentPages: counters.sentPages } });
    await root.session.close();
    root.listener.close();
  });

  test('can be left, closed and repeated in any order', async () => {
    const files = await scene.filledRegions('ram', LENGTHS_MIB);
    const group = randomGroup();
    const fetch = openFetch('one');
    const sender = await openSender(files, group);
    await fetch.joinMulticast({ ...group, member: 1 });
    const conflict = expect.objectContaining({ code: 'CONFLICT' });
    await expect(fetch.joinMulticast({ ...group, member: 2 })).rejects.toThrow(conflict);
    sender.start();
    expect(() => sender.start()).toThrow(expect.objectContaining({ code: 'USAGE' }));
    await fetch.close();
    await expect(fetch.joinMulticast({ ...group, member: 3 })).rejects.toThrow(conflict);
    await Promise.all([sender.close(), sender.close()]);
    expect(['closed', 'ended']).toContain(sender.snapshot().state);
    expect(() => sender.start()).toThrow(
      expect.objectContaining({ code: expect.stringMatching(/^(CONFLICT|USAGE)$/) }),
    );
  });

  test('is refused when it cannot work', async () => {
    const files = await scene.filledRegions('ram', LENGTHS_MIB);
    const refused = (change: Partial<MulticastGroup>, code: string): Promise<void> =>
      expect(openSender(files, randomGroup(change)), JSON.stringify(change)).rejects.toThrow(
        expect.objectContaining({ code }),
      );
    await refused({ provider: 'pigeon' }, 'UNSUPPORTED');
    await refused({ group: '127.0.0.1' }, 'USAGE');
    await refused({ group: 'ff15::1' }, 'USAGE');
    await refused({ interfaceAddress: '192.0.2.9' }, 'NOT_FOUND');
    await refused({ key: 'ff' }, 'USAGE');
    await refused({ session: 'x'.repeat(16) }, 'USAGE');
    await refused({ ttl: 0 }, 'USAGE');
    await refused({ port: 0 }, 'USAGE');
    await refused({ mtuBytes: 100 }, 'USAGE');
    const fetch = openFetch('one');
    for (const member of [0, 0xffff, 1.5]) {
      await expect(fetch.joinMulticast({ ...randomGroup(), member })).rejects.toThrow(
        expect.objectContaining({ code: 'USAGE' }),
      );
    }
    await fetch.close();
  });
});

describe('a probe of a group', () => {
  test('tells the largest packet that arrives', async () => {
    const group = randomGroup({ mtuBytes: 4000 });
    const stop = new AbortController();
    const sending = (async () => {
      while (!stop.signal.aborted) await binding.sendMulticastProbe(group, 1000, stop.signal);
    })();
    expect(await binding.receiveMulticastProbe(group, 10_000)).toEqual({ largestBytes: 4000 });
    stop.abort();
    await sending;
    expect(await binding.receiveMulticastProbe(group, 50)).toEqual({ largestBytes: 0 });
  });
});

describe('the pacer alone', () => {
  test('finds out what a receiver takes in', () => {
    const pacer = binding.openPacer({ bandwidthBytesPerS: 0 });
    const capacity = 20e6;
    const got = { clockNs: 1, highestSequence: 0, receivedDatagrams: 0, receivedBytes: 0 };
    let sentOfLastSecond = 0;
    for (let ms = 0; ms < 5000; ms++) {
      const sent = Math.floor(pacer.rateBytesPerS(ms * 1e6) / 1000 / 1000);
      const received = Math.min(sent, capacity / 1000 / 1000);
      got.highestSequence += sent;
      got.receivedDatagrams += received;
      got.receivedBytes += received * 1000;
      got.clockNs = ms * 1e6 + 1;
      if (ms % 20 === 19) pacer.report(1, got, ms * 1e6);
      if (ms >= 4000) sentOfLastSecond += sent * 1000;
    }
    expect(sentOfLastSecond).toBeGreaterThan(capacity * 0.85);
    expect(sentOfLastSecond).toBeLessThan(capacity * 1.1);
    expect(() => pacer.report(0, got, 0)).toThrow(expect.objectContaining({ code: 'USAGE' }));
    expect(() => pacer.rateBytesPerS(-1)).toThrow(expect.objectContaining({ code: 'USAGE' }));
  });
});

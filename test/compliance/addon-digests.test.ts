/** The native interface of digests: what a root makes, what a host accepts, and what a fetch does with them. */
import { createHash } from 'node:crypto';
import { closeSync, openSync, readFileSync, truncateSync, writeSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { loadNativeBinding } from '../../src/native/binding.js';
import type { ImageDigestsHandle, RegionFile } from '../../src/native/types.js';
import { CONSTANTS, NATIVE_ERROR } from '../../src/protocol/wire.js';
import { openSource, Scene, until } from '../support/fake-vm.js';

const binding = loadNativeBinding();
const LENGTHS_MIB = [4, 1];
const PAGES = LENGTHS_MIB.map((lengthMiB) => (lengthMiB << 20) / 4096);
const { DIGEST_BYTES } = CONSTANTS;
const withCode = (code: string): unknown => expect.objectContaining({ code });
let scene: Scene;

beforeEach(() => {
  scene = new Scene();
});
afterEach(async () => {
  await scene.dispose();
});

function openDigests(regions: readonly RegionFile[]): ImageDigestsHandle {
  const image = regions.map((region) => ({ ...region, digestPath: `${region.path}.digests` }));
  const digests = binding.openImageDigests({ image });
  scene.later(() => digests.close());
  return digests;
}

/** The files of a root with their digests, and of a host that knows none. */
async function rootAndHost() {
  const files = await scene.filledRegions('ram', LENGTHS_MIB);
  const made = openDigests(files);
  for (const [index, pageCount] of PAGES.entries()) await made.make(index, pageCount);
  const regions = scene.withPresence(scene.regions('leaf', LENGTHS_MIB));
  for (const region of regions) binding.createRegionFile(region);
  const digests = openDigests(regions);
  const accept = (): void => {
    for (const [index, pageCount] of PAGES.entries()) digests.accept(index, 0, made.read(index, 0, pageCount));
  };
  const fetch = binding.openImageFetch({
    ...{ image: regions, digests, bandwidthBytesPerS: 0, isResume: false },
    onEdge: () => undefined,
  });
  scene.later(() => fetch.close());
  const { listener, session, address } = await openSource(binding, scene, 'tcp', files);
  scene.later(async () => {
    await session.close();
    listener.close();
  });
  session.scan();
  await fetch.connect(address, 5000);
  return { files, regions, made, digests, accept, fetch };
}

function damage({ path }: RegionFile, page: number): void {
  const file = openSync(path, 'r+');
  writeSync(file, 'other', page * 4096 + 100);
  closeSync(file);
}

describe('digests of an image', () => {
  test('are the first bytes of the SHA-256 of each page, also of holes, and outlive their handle', async () => {
    const files = await scene.filledRegions('ram', LENGTHS_MIB);
    const digests = openDigests(files);
    expect(digests.known(1)).toBe(0);
    await digests.make(1, 100);
    expect(digests.known(1)).toBe(100);
    digests.close();
    digests.close();
    const again = openDigests(files);
    expect(again.known(1)).toBe(100);
    await again.make(1, PAGES[1]! - 100);
    const content = readFileSync(files[1]!.path);
    const known = again.read(1, 3, PAGES[1]! - 3);
    expect(known).toHaveLength((PAGES[1]! - 3) * DIGEST_BYTES);
    for (let page = 3; page < PAGES[1]!; page++) {
      const digest = createHash('sha256').update(content.subarray(page * 4096, (page + 1) * 4096));
      const at = (page - 3) * DIGEST_BYTES;
      expect(known.subarray(at, at + DIGEST_BYTES)).toEqual(digest.digest().subarray(0, DIGEST_BYTES));
    }
  });

  test('calls that cannot be done say so', async () => {
    const files = await scene.filledRegions('ram', LENGTHS_MIB);
    const digests = openDigests(files);
    expect(() => digests.known(2)).toThrow(withCode('USAGE'));
    expect(() => digests.known(-1)).toThrow(withCode('USAGE'));
    expect(() => digests.read(0, 0, 1)).toThrow(withCode('USAGE'));
    expect(() => digests.accept(0, 1, Buffer.alloc(DIGEST_BYTES))).toThrow(withCode('USAGE'));
    expect(() => digests.accept(0, 0, 'text' as unknown as Buffer)).toThrow(withCode('USAGE'));
    expect(() => digests.accept(0, 0, Buffer.alloc(DIGEST_BYTES + 1))).toThrow(withCode('PEER_PROTOCOL'));
    await expect(digests.make(0, PAGES[0]! + 1)).rejects.toThrow(withCode('USAGE'));
    await expect(digests.make(0, 0.5)).rejects.toThrow(withCode('USAGE'));
    truncateSync(files[0]!.path, 1 << 20);
    await expect(digests.make(0, PAGES[0]!)).rejects.toThrow(withCode('REGION_CHANGED'));
    const making = digests.make(1, PAGES[1]!).then(
      () => 'made',
      (error: unknown) => (error as { code: string }).code,
    );
    digests.close();
    expect(['made', 'CONFLICT']).toContain(await making);
    expect(() => digests.known(0)).toThrow(withCode('CONFLICT'));
    expect(() => digests.read(0, 0, 0)).toThrow(withCode('CONFLICT'));
    expect(() => digests.accept(0, 0, Buffer.alloc(0))).toThrow(withCode('CONFLICT'));
    await expect(digests.make(0, 1)).rejects.toThrow(withCode('CONFLICT'));
  });
});

describe('a fetch with digests', () => {
  test('refuses pages that differ, and fails when there are too many', async () => {
    const { files, accept, fetch } = await rootAndHost();
    damage(files[0]!, 8);
    accept();
    fetch.start();
    fetch.sweep();
    await until('failed', () => fetch.snapshot().state === 'failed');
    expect(fetch.snapshot().counters.refusedPages).toBeGreaterThan(0n);
    expect(fetch.snapshot().failure?.code).toBe(NATIVE_ERROR.DAMAGED);
  });

  test('checks the pages that came before, and goes on when the handle of the digests is closed', async () => {
    const { files, digests, accept, fetch, regions } = await rootAndHost();
    damage(files[0]!, 8);
    fetch.start();
    fetch.sweep();
    await until('complete', () => fetch.snapshot().state === 'complete');
    await expect(fetch.check(0, 0, 1)).rejects.toThrow(withCode('USAGE'));
    accept();
    expect(digests.known(0)).toBe(PAGES[0]);
    digests.close();
    expect(await fetch.check(0, 0, PAGES[0]!)).toBe(8);
    expect(await fetch.check(0, 9, PAGES[0]! - 9)).toBeNull();
    expect(await fetch.check(1, 0, PAGES[1]!)).toBeNull();
    expect(fetch.snapshot().counters.refusedPages).toBe(0n);
    const checking = fetch.check(1, 0, PAGES[1]!).catch((error: unknown) => (error as { code: string }).code);
    await fetch.close();
    expect([null, 'CONFLICT']).toContain(await checking);
    await expect(fetch.check(0, 0, 1)).rejects.toThrow(withCode('CONFLICT'));
    const options = { image: regions, bandwidthBytesPerS: 0, isResume: true, onEdge: () => undefined };
    expect(() => binding.openImageFetch({ ...options, digests })).toThrow(withCode('CONFLICT'));
  });

  test('digests of other regions are refused', async () => {
    const files = await scene.filledRegions('ram', LENGTHS_MIB);
    const digests = openDigests(files.slice(0, 1));
    const image = scene.withPresence(files);
    const options = { image, bandwidthBytesPerS: 0, isResume: false, onEdge: () => undefined };
    expect(() => binding.openImageFetch({ ...options, digests })).toThrow(withCode('USAGE'));
    expect(() => binding.openImageFetch({ ...options, digests: {} as ImageDigestsHandle })).toThrow(withCode('USAGE'));
  });
});

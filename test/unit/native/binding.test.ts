/** Arguments of native calls and codes of native failures. None of these tests needs the addon. */
import { describe, expect, test } from 'vitest';
import {
  checkCredentials,
  checkDigestsOptions,
  checkImageOptions,
  checkPages,
  checkPath,
  checkPlace,
  checkProbe,
  checkRegion,
  checkRegions,
  checkSnapshot,
  checkSocketPath,
  checkSource,
  checkSourceClone,
  checkTargetOptions,
} from '../../../src/native/check.js';
import { failureToError, thrownToError } from '../../../src/native/failure.js';
import type {
  DataListenerHandle,
  ImageCaptureOptions,
  ProviderPlace,
  RegionFile,
  SourceAddress,
  TargetOptions,
  VmMemorySnapshot,
} from '../../../src/native/types.js';
import { NATIVE_ERROR } from '../../../src/protocol/wire.js';

const code = (expected: string) => expect.objectContaining({ code: expected });
const region: RegionFile = { path: '/dev/shm/ram', lengthBytes: 1n << 20n, pageBytes: 4096 };
const credentials = { session: 'ab'.repeat(16), token: '0f'.repeat(32) };
const key = '0123456789abcdef'.repeat(3);
const options = { localAddress: '10.0.0.2', ackTimeoutExponent: 18, retryCount: 7 };
const source: SourceAddress = {
  provider: 'tcp',
  host: '10.0.0.1',
  port: 1,
  ...credentials,
  keys: [{ ram: key, dataMap: key }],
};
const snapshot: VmMemorySnapshot = {
  state: 'complete',
  pid: 123,
  descriptors: [{ numberInVm: 960, kind: 1 }],
  ranges: [{ regionIndex: 0, regionOffsetBytes: 0n, lengthBytes: 4096n, base: 1n << 40n, descriptorIndex: 0 }],
};
const target: TargetOptions = {
  regions: [{ ...region, presencePath: '/dev/shm/ram.presence' }],
  bandwidthBytesPerS: 0,
  isResume: false,
  onEdge: () => undefined,
};

const image: ImageCaptureOptions = {
  parent: null,
  source: [region],
  image: [{ ...region, path: '/dev/shm/image', presencePath: '/dev/shm/image.presence' }],
  isResume: false,
  onEdge: () => undefined,
};

const digested = { ...region, digestPath: '/dev/shm/ram.digests' };

describe('what is right passes', () => {
  test('once', () => {
    checkRegion(region);
    checkRegion({ ...region, lengthBytes: 1n << 30n, pageBytes: 1 << 30 });
    checkRegions([region]);
    checkCredentials(credentials);
    checkSource(source, 1000);
    checkSource({ ...source, host: '::1' }, 1000);
    checkSource({ ...source, provider: 'shm', host: '/run/data.sock', port: 0 }, 1000);
    checkSource({ ...source, provider: 'verbs', options }, 1000);
    checkProbe({ provider: 'verbs', host: '10.0.0.1', port: 1, options }, 1000);
    checkSnapshot(snapshot);
    checkTargetOptions(target);
    checkImageOptions(image);
    checkDigestsOptions({ image: [digested] });
    checkPages(0);
    checkPages(3, 0, 2 ** 40);
    checkRegion({ ...region, isPrivate: true });
    checkPlace({ provider: 'tcp', host: '0.0.0.0', port: 0 });
    checkPlace({ provider: 'shm', host: `/${'x'.repeat(106)}`, port: 0 });
    checkPlace({ provider: 'verbs', host: '10.0.0.2', port: 7401, options: { retryCount: 0 } });
  });
});

describe('what is wrong is refused before the addon sees it', () => {
  test.each<[string, Partial<Record<keyof RegionFile, unknown>>]>([
    ['a relative path', { path: 'ram' }],
    ['a path with a newline', { path: '/dev/shm/a\nb' }],
    ['a path with a zero byte', { path: '/dev/shm/a\0b' }],
    ['no path', { path: undefined }],
    ['a length that is a number', { lengthBytes: 4096 }],
    ['length zero', { lengthBytes: 0n }],
    ['a negative length', { lengthBytes: -4096n }],
    ['a part of a page', { lengthBytes: 4097n }],
    ['a length beyond any address', { lengthBytes: 1n << 63n }],
    ['another page size', { pageBytes: 8192 }],
    ['page size zero', { pageBytes: 0 }],
    ['a part of a huge page', { lengthBytes: 1n << 20n, pageBytes: 1 << 21 }],
  ])('region: %s', (_, changed) => {
    expect(() => checkRegion({ ...region, ...changed } as RegionFile)).toThrow(code('USAGE'));
  });

  test('region lists: empty, too long, the same file twice', () => {
    const many = Array.from({ length: 65 }, (_, index) => ({ ...region, path: `/ram${index}` }));
    for (const regions of [[], many, [region, region]]) expect(() => checkRegions(regions)).toThrow(code('USAGE'));
    checkRegions(many.slice(1));
  });

  test.each([
    { session: '' },
    { session: 'AB'.repeat(16) },
    { session: `${'ab'.repeat(15)}a\n` },
    { token: 'ab'.repeat(31) },
    { token: `${'ab'.repeat(32)}00` },
    { token: 'zz'.repeat(32) },
  ])('credentials: %j', (changed) => {
    expect(() => checkCredentials({ ...credentials, ...changed })).toThrow(code('USAGE'));
  });

  test.each<[Record<string, unknown>, string]>([
    [{ provider: '' }, 'USAGE'],
    [{ provider: null }, 'USAGE'],
    [{ options: null }, 'USAGE'],
    [{ options: { retryCount: -1 } }, 'USAGE'],
    [{ options: { retryCount: 0.5 } }, 'USAGE'],
    [{ options: { localAddress: null } }, 'USAGE'],
    [{ host: '/run/data\n.sock' }, 'PEER_PROTOCOL'],
    [{ host: `/${'x'.repeat(107)}` }, 'PEER_PROTOCOL'],
    [{ host: 'example.org' }, 'PEER_PROTOCOL'],
    [{ host: '' }, 'PEER_PROTOCOL'],
    [{ port: 0 }, 'PEER_PROTOCOL'],
    [{ port: 65536 }, 'PEER_PROTOCOL'],
    [{ port: 1.5 }, 'PEER_PROTOCOL'],
    [{ port: '1' }, 'PEER_PROTOCOL'],
    [{ provider: 'shm', host: 'relative' }, 'PEER_PROTOCOL'],
    [{ keys: 'none' }, 'PEER_PROTOCOL'],
    [{ keys: [null] }, 'PEER_PROTOCOL'],
    [{ keys: [{ ram: key }] }, 'PEER_PROTOCOL'],
    [{ keys: [{ ram: key, dataMap: key.toUpperCase() }] }, 'PEER_PROTOCOL'],
    [{ keys: [{ ram: `${key}\n`, dataMap: key }] }, 'PEER_PROTOCOL'],
    [{ keys: [{ ram: key.slice(1), dataMap: key }] }, 'PEER_PROTOCOL'],
  ])('source address: %j', (changed, expected) => {
    expect(() => checkSource({ ...source, ...changed }, 1000)).toThrow(code(expected));
  });

  test.each([0, -1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, 600_001])('timeout %d', (timeoutMs) => {
    expect(() => checkSource(source, timeoutMs)).toThrow(code('USAGE'));
  });

  test.each<Record<string, unknown>>([
    { pid: 0 },
    { pid: -1 },
    { pid: 1 << 23 },
    { pid: '1' },
    { descriptors: null },
    { descriptors: Array.from({ length: 17 }, () => ({ numberInVm: 1, kind: 1 })) },
    { descriptors: [{ numberInVm: -1, kind: 1 }] },
    { descriptors: [{ numberInVm: 1, kind: 3 }] },
    { ranges: 'all' },
    { ranges: [{ ...snapshot.ranges[0], base: '0' }] },
    { ranges: [{ ...snapshot.ranges[0], lengthBytes: -1n }] },
    { ranges: [{ ...snapshot.ranges[0], lengthBytes: 1n << 64n }] },
    { ranges: [{ ...snapshot.ranges[0], regionIndex: 1.5 }] },
  ])('saved snapshot %#', (changed) => {
    expect(() => checkSnapshot({ ...snapshot, ...changed })).toThrow(code('CORRUPT'));
  });

  test.each<Record<string, unknown>>([
    { bandwidthBytesPerS: -1 },
    { bandwidthBytesPerS: Number.NaN },
    { bandwidthBytesPerS: 2 ** 53 },
    { isResume: 'yes' },
    { onEdge: null },
    { regions: [{ ...region, presencePath: 'relative' }] },
    { regions: [] },
  ])('target options %#', (changed) => {
    expect(() => checkTargetOptions({ ...target, ...changed })).toThrow(code('USAGE'));
  });

  test.each<Record<string, unknown>>([
    { image: [] },
    { source: [] },
    { image: [image.image[0], { ...image.image[0], path: '/dev/shm/more' }] },
    { image: [{ ...image.image[0], lengthBytes: 2n << 20n }] },
    { image: [{ ...image.image[0], lengthBytes: 2n << 20n, pageBytes: 1 << 21 }] },
    { image: [{ ...image.image[0], path: region.path }] },
    { image: [{ ...image.image[0], presencePath: 'relative' }] },
    { image: [{ ...image.image[0], isPrivate: 'yes' }] },
    { isResume: 1 },
    { onEdge: undefined },
  ])('image options %#', (changed) => {
    expect(() => checkImageOptions({ ...image, ...changed })).toThrow(code('USAGE'));
  });

  test.each([
    { image: [] },
    { image: [{ ...digested, digestPath: 'relative' }] },
    { image: [{ ...digested, digestPath: region.path }] },
    { image: [digested, { ...digested, path: '/dev/shm/more' }] },
    { image: [{ ...digested, pageBytes: 8192 }] },
  ])('digests options %#', (changed) => {
    expect(() => checkDigestsOptions(changed)).toThrow(code('USAGE'));
  });

  test.each([[-1], [0.5], [2 ** 32], [0, -1], [0, 0, 0.5], [0, 2 ** 53]])('numbers of pages %#', (index, ...pages) => {
    expect(() => checkPages(index, ...pages)).toThrow(code('USAGE'));
  });

  test.each<object>([
    { ownPaths: [] },
    { ownPaths: ['/a', '/b'] },
    { ownPaths: ['relative'] },
    { ownPaths: undefined },
    { isResume: undefined },
  ])("a leaving clone's options %#", (changed) => {
    const clone = { vm: null, ownPaths: ['/dev/shm/ram.own'], isResume: false };
    const options = {
      listener: {} as DataListenerHandle,
      provider: 'tcp',
      ...credentials,
      regions: [region],
    } as const;
    checkSourceClone({ ...options, clone });
    expect(() => checkSourceClone({ ...options, clone: { ...clone, ...changed } })).toThrow(code('USAGE'));
  });

  test.each<Partial<Record<keyof ProviderPlace, unknown>>>([
    { host: 'localhost' },
    { host: 'relative/data.sock' },
    { host: `/${'x'.repeat(107)}` },
    { host: 7 },
    { port: -1 },
    { port: 65536 },
    { provider: '' },
    { options: { retryCount: null } },
  ])('a place to listen at: %j', (changed) => {
    const place = { provider: 'tcp', host: '10.0.0.1', port: 0, ...changed } as ProviderPlace;
    expect(() => checkPlace(place)).toThrow(code('USAGE'));
  });

  test('paths', () => {
    expect(() => checkPath('', 'path')).toThrow(code('USAGE'));
    expect(() => checkSocketPath(`/${'x'.repeat(107)}`, 'path')).toThrow(code('USAGE'));
  });
});

describe('native failures get the names of the project', () => {
  test('every code has one', () => {
    const names = Object.values(NATIVE_ERROR).map(
      (number) => failureToError({ code: number, errno: 0, what: 'x' }, 'doing').code,
    );
    expect(names).not.toContain('INTERNAL');
    expect(names[NATIVE_ERROR.PROCESS_GONE - 1]).toBe('QEMU_GONE');
  });

  test('the message says what was attempted, what failed and why', () => {
    const error = failureToError({ code: NATIVE_ERROR.NO_SPACE, errno: 28, what: 'ftruncate' }, 'create region /x');
    expect(error).toMatchObject({ code: 'NO_SPACE', message: 'create region /x: ftruncate (ENOSPC)' });
    expect(error.details).toEqual({ nativeCode: NATIVE_ERROR.NO_SPACE, errno: 28 });
  });

  test('an argument that only the kernel refused is no mistake of the caller', () => {
    const code = NATIVE_ERROR.INVALID_ARGUMENT;
    expect(failureToError({ code, errno: 0, what: 'x' }, 'y').code).toBe('USAGE');
    expect(failureToError({ code, errno: 22, what: 'x' }, 'y').code).toBe('NATIVE_FAILED');
  });

  test('a lost connection may be tried again', () => {
    expect(failureToError({ code: NATIVE_ERROR.DISCONNECTED, errno: 0, what: 'x' }, 'y').isRetryable).toBe(true);
    expect(failureToError({ code: NATIVE_ERROR.REFUSED, errno: 0, what: 'x' }, 'y').isRetryable).toBe(false);
  });

  test('what the addon did not throw on purpose is a bug of ours, with its cause', () => {
    const cause = new TypeError('odd');
    expect(thrownToError(cause, 'doing')).toMatchObject({ code: 'INTERNAL', cause });
    expect(failureToError({ code: 999, errno: 4242, what: 'x' }, 'y').code).toBe('NATIVE_FAILED');
  });
});

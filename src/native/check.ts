/**
 * Checks the arguments of native calls once. The addon relies on their types. A value that may come from a peer or a
 * saved file is checked again at its use (ranges by the kernel, keys by the source).
 */
import { isIP } from 'node:net';
import { DATA_SECURITIES, DATA_SECURITY_DEFAULT } from '../domain/data-security.js';
import { type ErrorCode, MigrationError } from '../domain/errors.js';
import { CONSTANTS, PRELOAD_DESCRIPTOR } from '../protocol/wire.js';
import type {
  Credentials,
  ImageCaptureOptions,
  ImageDigestsOptions,
  ImageFetchOptions,
  NearPlace,
  ProviderOptions,
  ProviderPlace,
  RegionFile,
  SourceAddress,
  SourceOptions,
  TargetOptions,
  TouchOrder,
  VmMemorySnapshot,
} from './types.js';

const PAGE_SIZES = [1 << 12, 1 << 21, 1 << 30];
const U64_MAX = (1n << 64n) - 1n;
const LENGTH_BYTES_MAX = 1n << 56n;
const CONNECT_TIMEOUT_MS_MAX = 600_000;
/** The kernel's own limit on process ids. */
const PID_MAX = 1 << 22;
const UNIX_PATH_BYTES_MAX = 107;
const KEY_HEX_DIGITS = 48;
const NEAR_LEVEL_MAX = 255;
const HOLD_MS_MAX = 600_000;

export function require(good: boolean, what: string, code: ErrorCode = 'USAGE'): asserts good {
  if (!good) throw new MigrationError(code, `native argument: ${what}`);
}

export const isIntegerIn = (value: unknown, min: number, max: number): value is number =>
  typeof value === 'number' && Number.isInteger(value) && value >= min && value <= max;
const isU64 = (value: unknown): value is bigint => typeof value === 'bigint' && value >= 0n && value <= U64_MAX;
export const isHex = (value: unknown, digits: number): value is string =>
  typeof value === 'string' && value.length === digits && /^[0-9a-f]*$/.test(value);

export function checkPath(path: unknown, what: string, code?: ErrorCode): asserts path is string {
  require(typeof path === 'string' && path.startsWith('/'), `${what} must be an absolute path`, code);
  require(!/[\0\n]/.test(path), `${what} must not contain a zero byte or a newline`, code);
}

export function checkSocketPath(path: unknown, what: string, code?: ErrorCode): asserts path is string {
  checkPath(path, what, code);
  require(Buffer.byteLength(path) <= UNIX_PATH_BYTES_MAX, `${what} is longer than ${UNIX_PATH_BYTES_MAX} bytes`, code);
}

export function checkHoldMs(holdMs: number): void {
  require(isIntegerIn(holdMs, 0, HOLD_MS_MAX), `holdMs must be a number from 0 to ${HOLD_MS_MAX}`);
}

export function checkRegion(region: RegionFile): void {
  checkPath(region.path, 'region path');
  require(PAGE_SIZES.includes(region.pageBytes), 'pageBytes must be 4 KiB, 2 MiB or 1 GiB');
  const { lengthBytes } = region;
  require(isU64(lengthBytes) &&
    lengthBytes > 0n &&
    lengthBytes <= LENGTH_BYTES_MAX, 'lengthBytes must be a bigint above 0');
  require(lengthBytes % BigInt(region.pageBytes) === 0n, 'lengthBytes must be a multiple of pageBytes');
  require(region.isPrivate === undefined ||
    typeof region.isPrivate === 'boolean', 'isPrivate must be a boolean or absent');
}

export function checkRegions(regions: readonly RegionFile[]): void {
  require(Array.isArray(regions) && regions.length > 0, 'regions must not be empty');
  require(regions.length <= CONSTANTS.PRELOAD_REGIONS_MAX, `at most ${CONSTANTS.PRELOAD_REGIONS_MAX} regions`);
  for (const region of regions) checkRegion(region);
  require(new Set(regions.map(({ path }) => path)).size === regions.length, 'a region file is named twice');
}

export function checkEdge(onEdge: unknown): void {
  require(typeof onEdge === 'function', 'onEdge must be a function');
}

export function checkAddress(address: unknown): void {
  require(typeof address === 'string' && isIP(address) !== 0, 'address must be an IP address');
}

export function checkPort(port: unknown, min: number): void {
  require(isIntegerIn(port, min, 65535), `port must be an integer from ${min} to 65535`);
}

export function checkProvider(provider: unknown, options?: ProviderOptions): void {
  require(typeof provider === 'string' && provider !== '', 'provider must be a non-empty string');
  if (options === undefined) return;
  require(typeof options === 'object' && options !== null, 'options must be an object');
  const isGood = (value: unknown): boolean => typeof value === 'string' || isIntegerIn(value, 0, 2 ** 32);
  require(Object.values(options).every(isGood), 'the values of options must be strings or integers');
}

/** Checks a place to listen at. */
export function checkPlace({ provider, host, port, options }: ProviderPlace): void {
  checkProvider(provider, options);
  if (typeof host === 'string' && host.startsWith('/')) checkSocketPath(host, 'host');
  else checkAddress(host);
  checkPort(port, 0);
}

/** Checks a place from a peer. The provider itself decides whether it connects to such a host. */
export function checkPeerPlace({ provider, host, port, options }: ProviderPlace): void {
  checkProvider(provider, options);
  const isPath = typeof host === 'string' && host.startsWith('/');
  if (isPath) return checkSocketPath(host, 'host', 'PEER_PROTOCOL');
  require(typeof host === 'string' && isIP(host) !== 0, 'host must be an IP address or a path', 'PEER_PROTOCOL');
  require(isIntegerIn(port, 1, 65535), 'port must be an integer from 1 to 65535', 'PEER_PROTOCOL');
}

export function checkTimeout(timeoutMs: number): void {
  require(isIntegerIn(timeoutMs, 1, CONNECT_TIMEOUT_MS_MAX), `timeoutMs must be 1 to ${CONNECT_TIMEOUT_MS_MAX}`);
}

export function checkProbe(peer: ProviderPlace, timeoutMs: number): void {
  checkPeerPlace(peer);
  checkTimeout(timeoutMs);
}

export function checkCredentials(options: Credentials): void {
  const { session, token, dataSecurity = DATA_SECURITY_DEFAULT, isOldHello = false } = options;
  require(isHex(session, 2 * CONSTANTS.SESSION_ID_BYTES), 'session must be 32 lower-case hex digits');
  require(isHex(token, 2 * CONSTANTS.SESSION_TOKEN_BYTES), 'token must be 64 lower-case hex digits');
  require(DATA_SECURITIES.includes(dataSecurity), `dataSecurity must be one of ${DATA_SECURITIES.join(', ')}`);
  require(typeof isOldHello === 'boolean', 'isOldHello must be a boolean');
}

/** Checks the address of a source. It comes from a peer, apart from provider and options. */
export function checkSource(source: SourceAddress, timeoutMs: number): void {
  checkPeerPlace(source);
  checkCredentials(source);
  checkTimeout(timeoutMs);
  require(Array.isArray(source.keys), 'keys must be an array', 'PEER_PROTOCOL');
  for (const keys of source.keys) {
    const good = isHex(keys?.ram, KEY_HEX_DIGITS) && isHex(keys.dataMap, KEY_HEX_DIGITS);
    const isPresenceGood = keys?.presence === undefined || isHex(keys.presence, KEY_HEX_DIGITS);
    const isDirtyMapGood = keys?.dirtyMap === undefined || isHex(keys.dirtyMap, KEY_HEX_DIGITS);
    require(good &&
      isPresenceGood &&
      isDirtyMapGood, `a remote key is ${KEY_HEX_DIGITS} lower-case hex digits`, 'PEER_PROTOCOL');
  }
}

export function checkNearId(id: unknown): void {
  require(isIntegerIn(id, 0, 2 ** 32 - 1), 'the id of a near holder must be an integer from 0 to 2^32 - 1');
}

/** Checks a near holder. Its address comes from a peer, apart from provider and options. */
export function checkNear(holder: SourceAddress, { id, level }: NearPlace, timeoutMs: number): void {
  checkSource(holder, timeoutMs);
  checkNearId(id);
  require(isIntegerIn(level, 0, NEAR_LEVEL_MAX), `the level of a near holder must be 0 to ${NEAR_LEVEL_MAX}`);
  const hasPresence = holder.keys.every(({ presence }) => presence !== undefined);
  require(hasPresence, 'the keys of a near holder must have presence', 'PEER_PROTOCOL');
}

/** Checks an order of clusters. Its numbers are hints: those that do not exist are passed over. */
export function checkOrder(order: TouchOrder): void {
  const isGood = order instanceof Uint32Array && order.length <= CONSTANTS.TOUCH_CLUSTERS_MAX;
  require(isGood, `an order of clusters must be a Uint32Array of at most ${CONSTANTS.TOUCH_CLUSTERS_MAX} numbers`);
}

export function checkTargetOptions(options: TargetOptions): void {
  if (options.order !== undefined) checkOrder(options.order);
  checkFilled(options.regions, options);
}

export function checkFetchOptions(options: ImageFetchOptions): void {
  checkFilled(options.image, options);
}

export function checkDigestsOptions({ image }: ImageDigestsOptions): void {
  checkRegions(image);
  for (const { digestPath } of image) checkPath(digestPath, 'digestPath');
  const paths = image.flatMap(({ path, digestPath }) => [path, digestPath]);
  require(new Set(paths).size === paths.length, 'a file of digests is named twice');
}

/** Checks numbers of pages of a region. The addon checks that the region has them. */
export function checkPages(regionIndex: number, ...pages: number[]): void {
  require(isIntegerIn(regionIndex, 0, CONSTANTS.PRELOAD_REGIONS_MAX), 'regionIndex must be the index of a region');
  for (const page of pages) require(isIntegerIn(page, 0, Number.MAX_SAFE_INTEGER), 'pages must be integers from 0');
}

export function checkBandwidth(bandwidthBytesPerS: number): void {
  require(isIntegerIn(bandwidthBytesPerS, 0, Number.MAX_SAFE_INTEGER), 'bandwidthBytesPerS must be 0 or more');
}

function checkFilled(
  regions: TargetOptions['regions'],
  { bandwidthBytesPerS, isResume, onEdge }: Omit<TargetOptions, 'regions'>,
): void {
  checkRegions(regions);
  for (const { presencePath } of regions) checkPath(presencePath, 'presencePath');
  checkBandwidth(bandwidthBytesPerS);
  require(typeof isResume === 'boolean', 'isResume must be a boolean');
  checkEdge(onEdge);
}

export function checkRound(round: unknown): void {
  require(isIntegerIn(round, 1, 2 ** 32 - 1), 'a round must be an integer from 1');
}

export function checkTracked({ tracked, clone, image }: SourceOptions): void {
  require(tracked === undefined || (clone === undefined && image === undefined), 'a clone or image is not tracked');
}

export function checkSourceClone({ clone, regions }: SourceOptions): void {
  if (clone === undefined) return;
  const { ownPaths, isResume } = clone;
  require(Array.isArray(ownPaths) && ownPaths.length === regions.length, 'ownPaths must have one path for each region');
  for (const path of ownPaths) checkPath(path, 'ownPaths');
  require(new Set(ownPaths).size === ownPaths.length, 'a file for own pages is named twice');
  require(typeof isResume === 'boolean', 'isResume must be a boolean');
}

export function checkImageOptions(options: ImageCaptureOptions): void {
  const { source, image } = options;
  checkRegions(source);
  checkRegions(image);
  for (const { presencePath } of image) checkPath(presencePath, 'presencePath');
  const isAlike = ({ lengthBytes, pageBytes }: RegionFile, index: number): boolean =>
    lengthBytes === source[index]?.lengthBytes && pageBytes === source[index].pageBytes;
  require(image.length === source.length &&
    image.every(isAlike), 'the regions of image and source must have the same lengths and page sizes');
  const paths = [...source, ...image].map(({ path }) => path);
  require(new Set(paths).size === paths.length, 'an image must not be its own source');
  require(typeof options.isResume === 'boolean', 'isResume must be a boolean');
  checkEdge(options.onEdge);
}

/** Checks a snapshot that was read from a file of this daemon. */
export function checkSnapshot(snapshot: VmMemorySnapshot): void {
  const good = (condition: boolean, what: string): void => require(condition, `VM snapshot: ${what}`, 'CORRUPT');
  good(isIntegerIn(snapshot.pid, 1, PID_MAX), 'pid');
  const { descriptors, ranges } = snapshot;
  good(Array.isArray(descriptors) && descriptors.length <= CONSTANTS.PRELOAD_DESCRIPTORS_MAX, 'descriptors');
  const kinds: readonly number[] = Object.values(PRELOAD_DESCRIPTOR);
  for (const { numberInVm, kind } of descriptors) {
    good(isIntegerIn(numberInVm, 0, 2 ** 31 - 1) && kinds.includes(kind), 'descriptor');
  }
  good(Array.isArray(ranges), 'ranges');
  for (const range of ranges) {
    const numbers = [range.regionIndex, range.descriptorIndex];
    const offsets = [range.regionOffsetBytes, range.lengthBytes, range.base];
    good(numbers.every((value) => isIntegerIn(value, 0, 2 ** 16)) && offsets.every(isU64), 'range');
  }
}

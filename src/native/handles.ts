/**
 * The handles of binding.ts, which wrap those of the addon. The failure of a call becomes a MigrationError that names
 * the attempted action.
 */

import { MigrationError } from '../domain/errors.js';
import {
  IMAGE_COUNTERS,
  type ImageCounter,
  SOURCE_COUNTERS,
  type SourceCounter,
  TARGET_COUNTERS,
  type TargetCounter,
} from '../protocol/wire.js';
import type {
  AddonDataListener,
  AddonImageCapture,
  AddonImageFetch,
  AddonSourceSession,
  AddonTargetSession,
  AddonVmMemory,
} from './addon.js';
import { attempt, attemptAsync } from './attempt.js';
import { checkHoldMs, checkNear, checkNearId, checkOrder, checkPages, checkRound, checkSource } from './check.js';
import type { ChunkRequest } from './chunk-types.js';
import { checkChunkRequest } from './chunks.js';
import { checkJoin } from './multicast.js';
import type { MulticastJoin, MulticastSnapshot } from './multicast-types.js';
import type {
  DataListenerHandle,
  DirtyRound,
  ImageCaptureHandle,
  ImageFetchHandle,
  ImageFetchSnapshot,
  ImageSnapshot,
  NativeFailure,
  NearPlace,
  NearSnapshot,
  Place,
  RegionKeys,
  SourceAddress,
  SourceSessionHandle,
  TargetSessionHandle,
  TargetSnapshot,
  TouchOrder,
  VmMemoryHandle,
  VmMemorySnapshot,
} from './types.js';

function named<Name extends string>(names: readonly Name[], values: BigUint64Array): Record<Name, bigint> {
  return Object.fromEntries(names.map((name, index) => [name, values[index] ?? 0n])) as Record<Name, bigint>;
}

export class VmMemory implements VmMemoryHandle {
  readonly native: AddonVmMemory;

  constructor(native: AddonVmMemory) {
    this.native = native;
  }

  /** Returns the addon's handle behind a handle of this binding. Throws USAGE for anything else. */
  static nativeOf(handle: VmMemoryHandle): AddonVmMemory {
    if (handle instanceof VmMemory) return handle.native;
    throw new MigrationError('USAGE', 'native argument: vm is not a handle of this binding');
  }

  snapshot(): VmMemorySnapshot {
    return attempt('VM memory', () => this.native.snapshot());
  }

  holdTrim(holdMs: number): void {
    checkHoldMs(holdMs);
    this.native.holdTrim(holdMs);
  }

  close(): void {
    attempt('close VM memory', () => this.native.close());
  }
}

export class DataListener implements DataListenerHandle {
  readonly native: AddonDataListener;
  /** The address for each provider that the listener serves. */
  readonly #addresses: Readonly<Record<string, Place>>;

  constructor(native: AddonDataListener) {
    this.native = native;
    this.#addresses = native.addresses();
  }

  address(provider: string): Place | null {
    return this.#addresses[provider] ?? null;
  }

  get isLost(): boolean {
    return this.native.isLost();
  }

  static nativeOf(handle: DataListenerHandle): AddonDataListener {
    if (handle instanceof DataListener) return handle.native;
    throw new MigrationError('USAGE', 'native argument: listener is not a handle of this binding');
  }

  close(): void {
    attempt('close data listener', () => this.native.close());
  }
}

export class SourceSession implements SourceSessionHandle {
  readonly keys: readonly RegionKeys[];
  readonly #native: AddonSourceSession;

  constructor(native: AddonSourceSession) {
    this.#native = native;
    this.keys = native.keys();
  }

  scan(): void {
    attempt('scan the memory of a source session', () => this.#native.scan());
  }

  async noteDirty(isLast: boolean): Promise<DirtyRound> {
    return attemptAsync('note which pages the VM has written', () => this.#native.noteDirty(isLast));
  }

  async hasChangedSinceLast(): Promise<boolean> {
    return attemptAsync('look for late writes', () => this.#native.hasChangedSinceLast());
  }

  async digestChunks(request: ChunkRequest): Promise<Buffer> {
    checkChunkRequest(request);
    return attemptAsync('digest the memory of a source session', () => this.#native.digestChunks(request));
  }

  snapshot(): { counters: Record<SourceCounter, bigint>; failure: NativeFailure | null } {
    const { counters, failure } = attempt('source session', () => this.#native.snapshot());
    return { counters: named(SOURCE_COUNTERS, counters), failure };
  }

  async close(): Promise<void> {
    await attemptAsync('close source session', () => this.#native.close());
  }
}

export class TargetSession implements TargetSessionHandle {
  readonly #native: AddonTargetSession;

  constructor(native: AddonTargetSession) {
    this.#native = native;
  }

  async connect(source: SourceAddress, timeoutMs: number): Promise<void> {
    checkSource(source, timeoutMs);
    await attemptAsync(`connect to the source at ${source.host}`, () => this.#native.connect(source, timeoutMs));
  }

  start(): void {
    attempt('start target session', () => this.#native.start());
  }

  serveDemand(): void {
    attempt('serve faults', () => this.#native.serveDemand());
  }

  fetchAhead(): void {
    attempt('fetch pages ahead', () => this.#native.fetchAhead());
  }

  holdAhead(): void {
    attempt('hold the fetching of pages', () => this.#native.holdAhead());
  }

  async takeBack(round: number): Promise<{ pages: number }> {
    checkRound(round);
    return attemptAsync('give up pages that the VM has written since', () => this.#native.takeBack(round));
  }

  snapshot(): TargetSnapshot {
    const { state, counters, failure } = attempt('target session', () => this.#native.snapshot());
    return { state, failure, counters: named<TargetCounter>(TARGET_COUNTERS, counters) };
  }

  async close(): Promise<void> {
    await attemptAsync('close target session', () => this.#native.close());
  }
}

export class ImageFetch implements ImageFetchHandle {
  readonly #native: AddonImageFetch;

  constructor(native: AddonImageFetch) {
    this.#native = native;
  }

  static nativeOf(handle: ImageCaptureHandle | ImageFetchHandle): AddonImageFetch | null {
    return handle instanceof ImageFetch ? handle.#native : null;
  }

  async connect(source: SourceAddress, timeoutMs: number): Promise<void> {
    checkSource(source, timeoutMs);
    await attemptAsync(`connect to the image at ${source.host}`, () => this.#native.connect(source, timeoutMs));
  }

  start(): void {
    attempt('serve the clones of an image', () => this.#native.start());
  }

  sweep(order?: TouchOrder): void {
    if (order !== undefined) checkOrder(order);
    attempt('read the rest of the image', () => this.#native.sweep(order));
  }

  async addNear(holder: SourceAddress, near: NearPlace, timeoutMs: number): Promise<void> {
    checkNear(holder, near, timeoutMs);
    const call = (): Promise<void> => this.#native.addNear(holder, timeoutMs, near.id, near.level);
    await attemptAsync(`connect to the near holder at ${holder.host}`, call);
  }

  removeNear(id: number): void {
    checkNearId(id);
    attempt('remove a near holder', () => this.#native.removeNear(id));
  }

  nears(): readonly NearSnapshot[] {
    return attempt('near holders', () => this.#native.nears());
  }

  addClone(vm: VmMemoryHandle): void {
    attempt('serve a clone', () => this.#native.addClone(VmMemory.nativeOf(vm)));
  }

  removeClone(vm: VmMemoryHandle): void {
    attempt('remove a clone', () => this.#native.removeClone(VmMemory.nativeOf(vm)));
  }

  touched(): TouchOrder {
    return attempt('what clones have touched', () => this.#native.touched());
  }

  async check(regionIndex: number, firstPage: number, pageCount: number): Promise<number | null> {
    checkPages(regionIndex, firstPage, pageCount);
    return attemptAsync('check the pages of an image', () => this.#native.check(regionIndex, firstPage, pageCount));
  }

  async joinMulticast(join: MulticastJoin): Promise<void> {
    checkJoin(join);
    await attemptAsync(`join the multicast of ${join.group}`, () => this.#native.joinMulticast(join));
  }

  multicast(): MulticastSnapshot {
    return attempt('multicast of an image', () => this.#native.multicast());
  }

  snapshot(): ImageFetchSnapshot {
    const { state, counters, failure } = attempt('image fetch', () => this.#native.snapshot());
    return { state, failure, counters: named<ImageCounter>(IMAGE_COUNTERS, counters) };
  }

  async close(): Promise<void> {
    await attemptAsync('close image fetch', () => this.#native.close());
  }
}

export class ImageCapture implements ImageCaptureHandle {
  readonly #native: AddonImageCapture;

  constructor(native: AddonImageCapture) {
    this.#native = native;
  }

  static nativeOf(handle: ImageCaptureHandle | ImageFetchHandle): AddonImageCapture | null {
    return handle instanceof ImageCapture ? handle.#native : null;
  }

  async arm(): Promise<void> {
    await attemptAsync("protect the parent's memory", () => this.#native.arm());
  }

  async protect(): Promise<void> {
    await attemptAsync('protect the pages that the parent has written', () => this.#native.protect());
  }

  async seal({ isSweepLater } = { isSweepLater: false }): Promise<void> {
    await attemptAsync('seal the image', () => this.#native.seal(isSweepLater));
  }

  async sweep(): Promise<void> {
    await attemptAsync('copy the rest of the image', () => this.#native.sweep());
  }

  async resume(): Promise<void> {
    await attemptAsync('resume filling the image', () => this.#native.resume());
  }

  addClone(vm: VmMemoryHandle): void {
    attempt('serve a clone', () => this.#native.addClone(VmMemory.nativeOf(vm)));
  }

  removeClone(vm: VmMemoryHandle): void {
    attempt('remove a clone', () => this.#native.removeClone(VmMemory.nativeOf(vm)));
  }

  touched(): TouchOrder {
    return attempt('what clones have touched', () => this.#native.touched());
  }

  snapshot(): ImageSnapshot {
    const { state, counters, failure } = attempt('image capture', () => this.#native.snapshot());
    return { state, failure, counters: named<ImageCounter>(IMAGE_COUNTERS, counters) };
  }

  async close(): Promise<void> {
    await attemptAsync('close image capture', () => this.#native.close());
  }

  async leave(): Promise<void> {
    await attemptAsync('leave image capture', () => this.#native.leave());
  }
}

/** Returns the addon's handle of an image that is served. Throws USAGE for anything else. */
export function imageOf(handle: ImageCaptureHandle | ImageFetchHandle): AddonImageCapture | AddonImageFetch {
  const native = ImageCapture.nativeOf(handle) ?? ImageFetch.nativeOf(handle);
  if (native !== null) return native;
  throw new MigrationError('USAGE', 'native argument: image is not a handle of this binding');
}

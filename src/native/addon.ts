/** The exports of vmigrate.node, which handles.ts wraps. */
import type { RdmaDevice } from '../domain/transport.js';
import type { ChunkRequest } from './chunk-types.js';
import type { AddonImageDigests } from './digests.js';
import type { AddonMulticastSender, AddonPacer, MulticastSenderOptions } from './multicast.js';
import type { MulticastGroup, MulticastJoin, MulticastSnapshot, PacerOptions } from './multicast-types.js';
import type {
  DirtyRound,
  ImageCaptureOptions,
  ImageCaptureState,
  ImageDigestsOptions,
  ImageFetchOptions,
  ImageFetchState,
  NativeBinding,
  NativeFailure,
  NativeSupport,
  NearSnapshot,
  Place,
  RegionFile,
  RegionKeys,
  SourceAddress,
  SourceOptions,
  TargetOptions,
  TargetSessionState,
  TouchOrder,
  VmMemorySnapshot,
} from './types.js';

export interface AddonVmMemory {
  snapshot(): VmMemorySnapshot;
  holdTrim(holdMs: number): void;
  close(): void;
}
export interface AddonDataListener {
  addresses(): Record<string, Place>;
  isLost(): boolean;
  close(): void;
}
export interface AddonSourceSession {
  keys(): RegionKeys[];
  scan(): void;
  noteDirty(isLast: boolean): Promise<DirtyRound>;
  hasChangedSinceLast(): Promise<boolean>;
  digestChunks(request: ChunkRequest): Promise<Buffer>;
  snapshot(): { counters: BigUint64Array; failure: NativeFailure | null };
  close(): Promise<void>;
}
export interface AddonTargetSession {
  connect(source: SourceAddress, timeoutMs: number): Promise<void>;
  start(): void;
  serveDemand(): void;
  fetchAhead(): void;
  holdAhead(): void;
  takeBack(round: number): Promise<{ pages: number }>;
  snapshot(): { state: TargetSessionState; counters: BigUint64Array; failure: NativeFailure | null };
  close(): Promise<void>;
}

export interface AddonImageCapture {
  arm(): Promise<void>;
  protect(): Promise<void>;
  seal(isSweepLater: boolean): Promise<void>;
  sweep(): Promise<void>;
  resume(): Promise<void>;
  addClone(vm: AddonVmMemory): void;
  removeClone(vm: AddonVmMemory): void;
  touched(): TouchOrder;
  snapshot(): { state: ImageCaptureState; counters: BigUint64Array; failure: NativeFailure | null };
  close(): Promise<void>;
  leave(): Promise<void>;
}

export interface AddonImageFetch {
  connect(source: SourceAddress, timeoutMs: number): Promise<void>;
  start(): void;
  sweep(order?: TouchOrder): void;
  addNear(holder: SourceAddress, timeoutMs: number, id: number, level: number): Promise<void>;
  removeNear(id: number): void;
  nears(): NearSnapshot[];
  addClone(vm: AddonVmMemory): void;
  removeClone(vm: AddonVmMemory): void;
  touched(): TouchOrder;
  check(regionIndex: number, firstPage: number, pageCount: number): Promise<number | null>;
  joinMulticast(join: MulticastJoin): Promise<void>;
  multicast(): MulticastSnapshot;
  snapshot(): { state: ImageFetchState; counters: BigUint64Array; failure: NativeFailure | null };
  close(): Promise<void>;
}

/** The exports of vmigrate.node. */
export interface Addon {
  support(): NativeSupport;
  createRegionFile(region: RegionFile): void;
  allocatedBytes(path: string): bigint;
  lockFile(descriptor: number): boolean;
  peerUser(descriptor: number): number;
  listenForVm(options: Parameters<NativeBinding['listenForVm']>[0]): AddonVmMemory;
  adoptVm(options: Parameters<NativeBinding['adoptVm']>[0]): AddonVmMemory;
  devices(provider: string): Promise<RdmaDevice[]>;
  probe(...args: Parameters<NativeBinding['probe']>): Promise<void>;
  openDataListener(options: Parameters<NativeBinding['openDataListener']>[0]): AddonDataListener;
  openSourceSession(
    listener: AddonDataListener,
    options: Omit<SourceOptions, 'listener'>,
    clone: AddonVmMemory | null,
    image: AddonImageCapture | AddonImageFetch | null,
    tracked: AddonVmMemory | null,
  ): Promise<AddonSourceSession>;
  openTargetSession(vm: AddonVmMemory, options: TargetOptions): AddonTargetSession;
  digestArrived(...args: Parameters<NativeBinding['digestArrived']>): Promise<Buffer>;
  openImageCapture(parent: AddonVmMemory | null, options: ImageCaptureOptions): AddonImageCapture;
  openImageFetch(options: ImageFetchOptions, digests: AddonImageDigests | null): AddonImageFetch;
  openImageDigests(options: ImageDigestsOptions): AddonImageDigests;
  openMulticastSender(options: MulticastSenderOptions): Promise<AddonMulticastSender>;
  sendMulticastProbe(group: MulticastGroup, durationMs: number): Promise<void>;
  receiveMulticastProbe(group: MulticastGroup, timeoutMs: number): Promise<number>;
  openPacer(options: PacerOptions): AddonPacer;
  releaseVm(vm: AddonVmMemory): Promise<void>;
  releaseTracked(vm: AddonVmMemory): Promise<void>;
}

import type { RdmaDevice } from '../domain/transport.js';
import type { ImageCounter } from '../protocol/wire.js';
import type { Credentials, NativeFailure, RegionFile, TouchOrder } from './basic-types.js';
import type { ChunkRequest, TaggedRegion } from './chunk-types.js';
import type {
  MulticastGroup,
  MulticastJoin,
  MulticastSenderHandle,
  MulticastSenderOptions,
  MulticastSnapshot,
  PacerHandle,
  PacerOptions,
} from './multicast-types.js';
import type { NearPlace, NearSnapshot } from './near-types.js';
import type {
  DataListenerHandle,
  ProviderPlace,
  SourceAddress,
  SourceSessionHandle,
  TargetOptions,
  TargetSessionHandle,
} from './session-types.js';

export type { Credentials, NativeFailure, RegionFile, TouchOrder } from './basic-types.js';
export type { NearPlace, NearSnapshot } from './near-types.js';
export type {
  DataListenerHandle,
  DirtyRound,
  Place,
  ProviderOptions,
  ProviderPlace,
  RegionKeys,
  SourceAddress,
  SourceSessionHandle,
  TargetOptions,
  TargetSessionHandle,
  TargetSessionState,
  TargetSnapshot,
} from './session-types.js';

export interface NativeSupport {
  readonly userfaultfdPermitted: boolean;
  readonly userfaultfdErrno: number;
  readonly minorShmem: boolean;
  readonly minorHugetlbfs: boolean;
  readonly wpAsync: boolean;
  readonly pagemapScan: boolean;
}

/** The data of the preload about one QEMU, sufficient to find its descriptors again after a restart. */
export interface VmMemorySnapshot {
  readonly state: 'waiting' | 'attached' | 'complete' | 'gone' | 'refused';
  readonly pid: number;
  readonly descriptors: readonly { readonly numberInVm: number; readonly kind: number }[];
  readonly ranges: readonly {
    readonly regionIndex: number;
    readonly regionOffsetBytes: bigint;
    readonly lengthBytes: bigint;
    readonly base: bigint;
    readonly descriptorIndex: number;
  }[];
  /** The reason for the state `refused`. */
  readonly failure?: NativeFailure | null;
}

export interface VmMemoryHandle {
  snapshot(): VmMemorySnapshot;
  /**
   * QEMU's `malloc_trim` does nothing for so long, or works again (0). It gives memory back that a load of device state
   * takes again at once. No effect on a closed handle, and on a VM of an earlier daemon, whose memory is trimmed.
   */
  holdTrim(holdMs: number): void;
  /**
   * Stops listening and closes the daemon's descriptors; the preload keeps its own. Throws while a target session is
   * open on the memory.
   */
  close(): void;
}

/**
 * idle ──arm──► arming ──► armed ──seal──► copying ──► complete; failed from any of the middle ones, closed by close or
 * leave. failed (no space, a file that shrank): the parent has been let go and runs on; clones wait for ever for pages
 * that are not there.
 */
export type ImageCaptureState = 'idle' | 'arming' | 'armed' | 'copying' | 'complete' | 'failed' | 'closed';

export interface ImageSnapshot {
  readonly state: ImageCaptureState;
  readonly failure: NativeFailure | null;
  readonly counters: Record<ImageCounter, bigint>;
}

/** Copies a running VM into an image and meanwhile serves the clones that run on it: docs/PAGE_STATES.md, "Images". */
export interface ImageCaptureHandle {
  /** Write-protects all memory of the running parent, piece by piece. From here on its writes are noted and allowed. */
  arm(): Promise<void>;
  /** Protects the pages written since again. The parent must be stopped. May be repeated. */
  protect(): Promise<void>;
  /**
   * The fork point: the last protect. From here on a write of the parent waits until its page is copied. Copying
   * begins. With `isSweepLater` only pages that parent and clones ask for are copied until `sweep`.
   */
  seal(options?: { readonly isSweepLater: boolean }): Promise<void>;
  /** Copies the rest, after seal. Idempotent. */
  sweep(): Promise<void>;
  /** Before `complete`: abandons the image and unprotects the parent, which runs on. After: frees what is left. */
  resume(): Promise<void>;
  /**
   * Serves the clone's faults from now on. Before seal the faults wait. The preload has registered the clone
   * (isIncoming), and its regions are those of the image.
   */
  addClone(vm: VmMemoryHandle): void;
  /** Must precede the close of the clone's handle. No effect if it was not added or the image is complete. */
  removeClone(vm: VmMemoryHandle): void;
  /**
   * The clusters (CONSTANTS.TOUCH_CLUSTER_BYTES of memory, numbered through all regions) that clones have touched so
   * far, in that order, each once. Nothing is added once the image is complete. Empty once the handle is closed.
   */
  touched(): TouchOrder;
  snapshot(): ImageSnapshot;
  /** Before `complete`: abandons the image and unprotects the parent, which keeps running. After: frees the rest. */
  close(): Promise<void>;
  /** Ends the threads and leaves all memory protected for the next daemon's `resume`. */
  leave(): Promise<void>;
}

/** idle ──start──► copying ◄──► disconnected; copying ──► complete; failed from any of the middle ones. */
export type ImageFetchState = 'idle' | 'copying' | 'disconnected' | 'complete' | 'failed' | 'closed';

export interface ImageFetchSnapshot {
  readonly state: ImageFetchState;
  readonly failure: NativeFailure | null;
  /** Those of the parent are 0. */
  readonly counters: Record<ImageCounter, bigint>;
}

/**
 * Fills an image of this host from another holder of it, and meanwhile serves the clones that run on it:
 * docs/PAGE_STATES.md, "Images".
 */
export interface ImageFetchHandle {
  /** As for a target session. The state must be idle or disconnected. */
  connect(source: SourceAddress, timeoutMs: number): Promise<void>;
  /** Serves clones from now on. Only the pages that they ask for are read, and which pages are holes. */
  start(): void;
  /** Reads the remaining pages as well, after start, those of the order first. Idempotent. */
  sweep(order?: TouchOrder): void;
  /**
   * Reads from this host too, which holds a part of the image or all of it, before the host of connect is asked: a
   * source session of an ImageFetchHandle, whose keys have `presence`. Pages that clones wait for are asked of the
   * nearest level that is connected (0 first), then of the next; the others come from that level alone. `id` is the
   * caller's name for the holder. One that is lost, or wrong, stays in `nears` with its failure, and is replaced by
   * another addNear of its id; while it is connected that fails with CONFLICT. Any number of calls may run at once, in
   * every state. Does nothing once the image is complete.
   */
  addNear(holder: SourceAddress, near: NearPlace, timeoutMs: number): Promise<void>;
  /** What the holder was asked for is asked elsewhere. Without effect if there is no such holder. */
  removeNear(id: number): void;
  nears(): readonly NearSnapshot[];
  /** As for a capture. Before start the faults wait. */
  addClone(vm: VmMemoryHandle): void;
  removeClone(vm: VmMemoryHandle): void;
  /**
   * Compares the pages of the range that are here with their digests, all of which must be known. Resolves to the first
   * page that differs, or to null. Pages whose digests were known before they came have been compared then. Call it for
   * each range of digests that becomes known after start: then every page has been compared when the state is complete.
   * Off the main thread, in every state; fails with CONFLICT once the handle is closed.
   */
  check(regionIndex: number, firstPage: number, pageCount: number): Promise<number | null>;
  /** As for a capture. */
  touched(): TouchOrder;
  /**
   * Takes pages that the root sends to a group as well, until that ends. Once only. A failure changes nothing. Resolves
   * when this host is in the group, which a fabric may take seconds for.
   */
  joinMulticast(join: MulticastJoin): Promise<void>;
  multicast(): MulticastSnapshot;
  snapshot(): ImageFetchSnapshot;
  /** Resolves when the threads have ended. Missing pages stay missing, and clones that wait for them keep waiting. */
  close(): Promise<void>;
}

/**
 * The digests of an image's pages: the first 16 bytes (CONSTANTS.DIGEST_BYTES) of the SHA-256 of each page. They become
 * known from the first page of a region on, and are kept in a file for each region, which outlives the handle. The host
 * that has the image makes them; a host that reads it from another accepts them. Region indexes and pages are those of
 * the image.
 */
export interface ImageDigestsHandle {
  /** So many digests of the region are known, from its first page on. */
  known(regionIndex: number): number;
  /**
   * Reads the next `pageCount` pages of the region's file off the main thread, and adds their digests. Every byte of
   * the image must be there. Some are known even if it fails: with REGION_CHANGED if the file has become shorter, with
   * CONFLICT soon after close. A range of many pages takes a thread of the pool for as long as it lasts.
   */
  make(regionIndex: number, pageCount: number): Promise<void>;
  /** Known digests, DIGEST_BYTES for each page, in a buffer of its own. */
  read(regionIndex: number, firstPage: number, pageCount: number): Buffer;
  /**
   * Adds digests, DIGEST_BYTES for each page. `firstPage` must be the number of known ones. Fails with PEER_PROTOCOL if
   * they are not whole, or more than the region has pages.
   */
  accept(regionIndex: number, firstPage: number, digests: Uint8Array): void;
  /** Idempotent. A fetch that was opened with the digests keeps them for itself. */
  close(): void;
}

export interface ImageDigestsOptions {
  readonly image: readonly (RegionFile & { readonly digestPath: string })[];
}

export interface ImageFetchOptions {
  readonly image: readonly (RegionFile & { readonly presencePath: string })[];
  /**
   * What the pages of `image` must be, as far as it is known. A page that comes later and differs is asked for again
   * (refusedPages); too many of them, or one that a clone may have seen, fail the fetch with DAMAGED. Null: the holder
   * is believed.
   */
  readonly digests: ImageDigestsHandle | null;
  /** Of pages that no clone waits for; 0 for no limit. */
  readonly bandwidthBytesPerS: number;
  /** Take over the presence maps of an earlier process. */
  readonly isResume: boolean;
  readonly onEdge: () => void;
}

export interface ImageCaptureOptions {
  /** The VM whose writes are held back. Null if it has ended or the image is complete: only its files are read. */
  readonly parent: VmMemoryHandle | null;
  /** The parent's region files. */
  readonly source: readonly RegionFile[];
  /** The image's region files, with the lengths, page sizes and order of `source`. */
  readonly image: readonly (RegionFile & { readonly presencePath: string })[];
  /**
   * Use the existing presence maps. Every page that they do not show as present is still protected in the parent, or
   * never changes.
   */
  readonly isResume: boolean;
  readonly onEdge: () => void;
}

export interface SourceOptions extends Credentials {
  readonly listener: DataListenerHandle;
  /** A provider that the listener serves. */
  readonly provider: string;
  readonly regions: readonly RegionFile[];
  /**
   * The clone that maps the regions, files of an image, copy-on-write. Over tcp only. Absent if the files contain all
   * memory.
   */
  readonly clone?: SourceClone;
  /**
   * The VM's preload memory: its writes are tracked, which begins before anything is exposed. The search for holes
   * begins at once, while the VM runs, without a call of scan. Not of a clone or an image.
   */
  readonly tracked?: VmMemoryHandle;
  /**
   * Absent if the files contain all memory. Not over providers that share files.
   *
   * A capture whose image the regions are: from its seal on their pages can be read, and pages that are not in the
   * image yet are copied first. Scan after the seal; close the session before the capture. Not over providers that
   * register memory.
   *
   * Or a fetch: the pages that are here are served to hosts for which this one is a near holder (addNear), while the
   * others still come. Scan when the image is complete, if at all. The session may outlive the fetch: a complete image
   * is served on; of one that has failed, or was closed before, over tcp every READ fails.
   */
  readonly image?: ImageCaptureHandle | ImageFetchHandle;
}

export interface SourceClone {
  /** The pages that it has written are read from its process until they are copied. Null if it has ended. */
  readonly vm: VmMemoryHandle | null;
  /** The files to which the scan copies those pages, one for each region. The scan creates them and leaves them. */
  readonly ownPaths: readonly string[];
  /**
   * The clone is stopped, and an earlier daemon may have copied all its pages. Fails with QEMU_GONE if some are not
   * copied and the clone has ended.
   */
  readonly isResume: boolean;
}

export interface NativeBinding {
  support(): NativeSupport;
  /** Creates a sparse region file. Fails if it exists. `at` is another path of it; errors name `region.path`. */
  createRegionFile(region: RegionFile, at?: string): void;
  /** Bytes of the file that are allocated. */
  allocatedBytes(path: string): bigint;
  /**
   * Locks the file behind an open descriptor until it is closed, also against other hosts that share the file system.
   * Returns false if another descriptor holds the lock.
   */
  lockFile(descriptor: number): boolean;
  /** The uid of the process at the other end of a unix socket, when it connected. */
  peerUser(descriptor: number): number;
  /**
   * Listens on a unix socket for the preload of one QEMU. If `isIncoming` is set, every mapped range is registered for
   * missing and minor faults before the mapping call returns. Each connection must come from a process of `peerUid`
   * (default: the daemon's user). The first connection that says hello is accepted.
   */
  listenForVm(options: {
    socketPath: string;
    regions: readonly RegionFile[];
    isIncoming: boolean;
    peerUid?: number;
    onEdge: () => void;
  }): VmMemoryHandle;
  /**
   * Reattaches to a running QEMU after a restart of the daemon, by taking its descriptors back (pidfd_getfd). Fails
   * with QEMU_GONE if that process has ended.
   */
  adoptVm(options: { snapshot: VmMemorySnapshot; regions: readonly RegionFile[]; onEdge?: () => void }): VmMemoryHandle;
  /** Returns a provider's devices here. Throws UNSUPPORTED, naming the package, if its libraries are missing. */
  devices(provider: string): Promise<readonly RdmaDevice[]>;
  /** Resolves if a host listens at that place, whether or not it would accept a session. */
  probe(peer: ProviderPlace, timeoutMs: number): Promise<void>;
  openDataListener(options: { readonly listen: readonly ProviderPlace[] }): DataListenerHandle;
  /** If memory is registered, the call takes as long as that: the holes of its files are noted, then filled. */
  openSourceSession(options: SourceOptions): Promise<SourceSessionHandle>;
  openTargetSession(vm: VmMemoryHandle, options: TargetOptions): TargetSessionHandle;
  /** As SourceSessionHandle.digestChunks, of what has arrived: from the tags of a session that is complete. */
  digestArrived(region: TaggedRegion, request: ChunkRequest): Promise<Buffer>;
  openImageCapture(options: ImageCaptureOptions): ImageCaptureHandle;
  openImageFetch(options: ImageFetchOptions): ImageFetchHandle;
  /**
   * Opens the files of digests of an image whose files exist. A file of digests that is intact and of this geometry is
   * taken over with what is known in it; any other is replaced.
   */
  openImageDigests(options: ImageDigestsOptions): ImageDigestsHandle;
  /** Resolves when this host is in the group, as joinMulticast. */
  openMulticastSender(options: MulticastSenderOptions): Promise<MulticastSenderHandle>;
  /** Sends probes to the group for so long, or until `stop`. The receivers must have begun to listen. */
  sendMulticastProbe(group: MulticastGroup, durationMs: number, stop?: AbortSignal): Promise<void>;
  /**
   * Joins the group until a probe of the largest size has come, or only smaller ones do, or the time is over. The
   * answer is the size of the largest one that has come, as an IP packet: a value for `mtuBytes`. 0: none.
   */
  receiveMulticastProbe(group: MulticastGroup, timeoutMs: number): Promise<{ readonly largestBytes: number }>;
  /** The pacing of a multicast alone, for models of groups. */
  openPacer(options: PacerOptions): PacerHandle;
  /** Unregisters and unprotects all memory of a VM whose capture is not resumed. */
  releaseVm(vm: VmMemoryHandle): Promise<void>;
  /** Ends the tracking of a VM's writes that an earlier process has begun. Idempotent. */
  releaseTracked(vm: VmMemoryHandle): Promise<void>;
}

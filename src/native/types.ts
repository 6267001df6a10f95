import type { RdmaDevice } from '../domain/transport.js';
import type { ImageCounter, SourceCounter, TargetCounter } from '../protocol/wire.js';

export interface RegionFile {
  readonly path: string;
  readonly lengthBytes: bigint;
  readonly pageBytes: number;
  /**
   * QEMU maps the file copy-on-write (`share=off`), as a clone maps its image. For listenForVm, adoptVm, and the source
   * of openImageCapture, where the parent is a clone itself: what it has written is read from its process.
   */
  readonly isPrivate?: boolean;
}

export interface NativeSupport {
  readonly userfaultfdPermitted: boolean;
  readonly userfaultfdErrno: number;
  readonly minorShmem: boolean;
  readonly minorHugetlbfs: boolean;
  readonly wpAsync: boolean;
  readonly pagemapScan: boolean;
}

/** What the preload gave us about one QEMU; enough to find the descriptors again after a restart. */
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
  /** Why the state is `refused`. */
  readonly failure?: NativeFailure | null;
}

export interface VmMemoryHandle {
  snapshot(): VmMemorySnapshot;
  /**
   * Stops listening and drops our descriptors; the preload keeps its own. Not while a target session is open on it
   * (throws).
   */
  close(): void;
}

/** Keys travel as hex between daemons; only the provider that made one understands it. */
export interface RegionKeys {
  readonly ram: string;
  readonly dataMap: string;
}

/** What a provider is told beyond a place, by names of its own (native/transport, a folder for each provider). */
export type ProviderOptions = Readonly<Record<string, number | string>>;

/** Where a provider listens. */
export interface Place {
  /** IP address, or the path of a unix socket. */
  readonly host: string;
  /** 0 for a socket's path. To listen: 0 lets the kernel choose. */
  readonly port: number;
}

export interface ProviderPlace extends Place {
  /** Its name in the registry of native/transport. */
  readonly provider: string;
  readonly options?: ProviderOptions;
}

export interface DataListenerHandle {
  /** null: it does not listen for this provider. */
  address(provider: string): Place | null;
  /** A device that it listens on has been removed: nobody is served there any more. */
  readonly isLost: boolean;
  /** Not while a source session is open on it (throws). */
  close(): void;
}

export interface SourceSessionHandle {
  readonly keys: readonly RegionKeys[];
  /** The VM has stopped: look through its files for holes (on a native thread). */
  scan(): void;
  snapshot(): { readonly counters: Record<SourceCounter, bigint>; readonly failure: NativeFailure | null };
  /**
   * Serves nobody from here on. Resolves when the memory is no longer registered, the session's name is free and the
   * listener may be closed.
   */
  close(): Promise<void>;
}

export interface NativeFailure {
  /** NATIVE_ERROR value */
  readonly code: number;
  readonly errno: number;
  readonly what: string;
}

export type TargetSessionState = 'idle' | 'filling' | 'disconnected' | 'complete' | 'failed' | 'closed';

export interface TargetSnapshot {
  readonly state: TargetSessionState;
  readonly failure: NativeFailure | null;
  readonly counters: Record<TargetCounter, bigint>;
}

export interface SourceAddress extends ProviderPlace {
  /** 32 hex digits */
  readonly session: string;
  /** 64 hex digits */
  readonly token: string;
  readonly keys: readonly RegionKeys[];
}

export interface TargetSessionHandle {
  /**
   * Opens both channels off the main thread; a provider with devices registers the memory, which puts a page behind
   * each byte. From idle or disconnected.
   */
  connect(source: SourceAddress, timeoutMs: number): Promise<void>;
  /** Serve faults now, if serveDemand has not begun it; prefetch as soon as the source's data map is ready. */
  start(): void;
  /** Serve faults now and fetch nothing else until start(): while the device state is loaded, before the VM runs. */
  serveDemand(): void;
  snapshot(): TargetSnapshot;
  /** Resolves when the session's threads have ended and its files are closed. */
  close(): Promise<void>;
}

export interface TargetOptions {
  readonly regions: readonly (RegionFile & { readonly presencePath: string })[];
  /** Prefetch only; 0 for no limit. */
  readonly bandwidthBytesPerS: number;
  /** Take over the presence maps of an earlier process. */
  readonly isResume: boolean;
  readonly onEdge: () => void;
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

/** Takes an image of a running VM and serves the clones that run on it meanwhile. docs/PAGE_STATES.md, "Images". */
export interface ImageCaptureHandle {
  /** The parent runs: protects all of its memory, piece by piece. From here on its writes are noted and let through. */
  arm(): Promise<void>;
  /** The parent stands still: protects again what was written since. Again as often as wanted. */
  protect(): Promise<void>;
  /**
   * The fork point: the last protect, from which on a write of the parent waits until its page is copied. Copying
   * begins; `isSweepLater`: only of what parent and clones ask for, until `sweep`.
   */
  seal(options?: { readonly isSweepLater: boolean }): Promise<void>;
  /** After seal: the rest is copied as well. Idempotent. */
  sweep(): Promise<void>;
  /** From idle, after a restart of the daemon, in place of arm and seal: goes on where the presence maps say. */
  resume(): Promise<void>;
  /**
   * Its faults are served from now on; before seal they wait. Registered by the preload (isIncoming), regions as the
   * image's.
   */
  addClone(vm: VmMemoryHandle): void;
  /** Before its handle is closed. Nothing happens for one that was not added, or whose image is complete. */
  removeClone(vm: VmMemoryHandle): void;
  snapshot(): ImageSnapshot;
  /** Before complete: gives the image up; the parent is let go and runs on. After: frees what is left. */
  close(): Promise<void>;
  /** Ends our threads and leaves everything as it is, protected, for the next daemon's `resume`. */
  leave(): Promise<void>;
}

export interface ImageCaptureOptions {
  /** Whose writes are held back. null: it is gone, or the image is complete; only its files are read. */
  readonly parent: VmMemoryHandle | null;
  /** The parent's region files. */
  readonly source: readonly RegionFile[];
  /** As long, with the same page sizes, in the same order. */
  readonly image: readonly (RegionFile & { readonly presencePath: string })[];
  /**
   * Take over presence maps. Every page that they do not call present is still protected in the parent, or never
   * changes.
   */
  readonly isResume: boolean;
  readonly onEdge: () => void;
}

export interface SourceOptions {
  readonly listener: DataListenerHandle;
  /** One that the listener listens for. */
  readonly provider: string;
  readonly session: string;
  readonly token: string;
  readonly regions: readonly RegionFile[];
  /**
   * The regions are files of an image that this clone maps copy-on-write. Over tcp only. Absent: the files have all of
   * the memory.
   */
  readonly clone?: SourceClone;
}

export interface SourceClone {
  /** What it has written is read from its process until it has been copied. null: it has ended. */
  readonly vm: VmMemoryHandle | null;
  /** Where that is copied to by the scan: one file for each region, made then and left there. */
  readonly ownPaths: readonly string[];
  /**
   * The clone stands still, and an earlier daemon may have copied all of it. PROCESS_GONE if it has not and the clone
   * has ended.
   */
  readonly isResume: boolean;
}

export interface NativeBinding {
  support(): NativeSupport;
  /** New sparse region file, exclusive. */
  createRegionFile(region: RegionFile): void;
  /** Bytes of the file that hold data. */
  allocatedBytes(path: string): bigint;
  /**
   * Listens on a unix socket for the preload of one QEMU. `isIncoming`: every mapped range is registered for missing
   * and minor faults before the mapping call returns. Each connection must come from a process of our own user; the
   * first one to say hello is taken.
   */
  listenForVm(options: {
    socketPath: string;
    regions: readonly RegionFile[];
    isIncoming: boolean;
    onEdge: () => void;
  }): VmMemoryHandle;
  /**
   * Takes the descriptors of a running QEMU back (pidfd_getfd), after our own restart. Throws PROCESS_GONE if that
   * process has ended.
   */
  adoptVm(options: { snapshot: VmMemorySnapshot; regions: readonly RegionFile[]; onEdge?: () => void }): VmMemoryHandle;
  /** A provider's devices here. UNSUPPORTED where its libraries are missing; the message names the package. */
  devices(provider: string): Promise<readonly RdmaDevice[]>;
  /** Resolves when a host listens there, whoever it lets in. */
  probe(peer: ProviderPlace, timeoutMs: number): Promise<void>;
  openDataListener(options: { readonly listen: readonly ProviderPlace[] }): DataListenerHandle;
  /** Where memory is registered it takes as long as that does: holes of its files are noted, then filled. */
  openSourceSession(options: SourceOptions): Promise<SourceSessionHandle>;
  openTargetSession(vm: VmMemoryHandle, options: TargetOptions): TargetSessionHandle;
  openImageCapture(options: ImageCaptureOptions): ImageCaptureHandle;
  /** Lets a VM go whose capture is not taken up again: nothing of it is registered or protected after this. */
  releaseVm(vm: VmMemoryHandle): Promise<void>;
}

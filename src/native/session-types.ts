/** The two halves of the transfer of a VM's memory, and where they meet. */
import type { SourceCounter, TargetCounter } from '../protocol/wire.js';
import type { Credentials, NativeFailure, RegionFile, TouchOrder } from './basic-types.js';
import type { ArrivalTags, ChunkRequest } from './chunk-types.js';

/** Daemons exchange keys as hex. Only the provider that made a key can interpret it. */
export interface RegionKeys {
  readonly ram: string;
  readonly dataMap: string;
  /** Of a region of an image that its host still fills: which of its pages are there. */
  readonly presence?: string;
  /** Which pages the VM has written since the last round. Of a source that tracks writes. */
  readonly dirtyMap?: string;
}

/** Options of a provider besides the place, under names of its own (native/transport, a folder for each provider). */
export type ProviderOptions = Readonly<Record<string, number | string>>;

/** The address at which a provider listens. */
export interface Place {
  /** IP address, or the path of a unix socket. */
  readonly host: string;
  /** 0 for the path of a socket. When listening, 0 lets the kernel choose. */
  readonly port: number;
}

export interface ProviderPlace extends Place {
  /** The provider's name in the registry of native/transport. */
  readonly provider: string;
  readonly options?: ProviderOptions;
}

export interface DataListenerHandle {
  /** Returns null if the listener does not serve this provider. */
  address(provider: string): Place | null;
  /** A device of the listener has been removed. It serves nobody any more. */
  readonly isLost: boolean;
  /** Throws while a source session is open on the listener. */
  close(): void;
}

export interface DirtyRound {
  readonly round: number;
  readonly dirtyPages: number;
  /** Of them, how many the round before has named, too. 0 in the last round. */
  readonly againPages: number;
}

export interface SourceSessionHandle {
  readonly keys: readonly RegionKeys[];
  /** Starts the scan of the files for holes on a native thread. The VM must have stopped. */
  scan(): void;
  /**
   * Publishes in the dirty maps which pages were written since the last call, or since the session was opened, and
   * protects them again. Rounds count from 1. `isLast`: the VM has stopped, and the map is final. Only of a session
   * that tracks writes, off the main thread.
   */
  noteDirty(isLast: boolean): Promise<DirtyRound>;
  /** Off the main thread, after the last round: whether a page was written that it does not name. */
  hasChangedSinceLast(): Promise<boolean>;
  /** The digests of chunks, CONSTANTS.PAGE_TAG_BYTES for each, off the main thread. The VM must have stopped. */
  digestChunks(request: ChunkRequest): Promise<Buffer>;
  snapshot(): { readonly counters: Record<SourceCounter, bigint>; readonly failure: NativeFailure | null };
  /**
   * Stops serving. Resolves when the memory is no longer registered, the session's id is free and the listener may be
   * closed.
   */
  close(): Promise<void>;
}

export type TargetSessionState = 'idle' | 'ahead' | 'filling' | 'disconnected' | 'complete' | 'failed' | 'closed';

export interface TargetSnapshot {
  readonly state: TargetSessionState;
  readonly failure: NativeFailure | null;
  readonly counters: Record<TargetCounter, bigint>;
}

export interface SourceAddress extends ProviderPlace, Credentials {
  readonly keys: readonly RegionKeys[];
}

export interface TargetSessionHandle {
  /**
   * Opens both channels off the main thread. A provider with devices registers the memory, which puts a page behind
   * each byte. The state must be idle or disconnected.
   */
  connect(source: SourceAddress, timeoutMs: number): Promise<void>;
  /**
   * Fetches every missing page while the VM still runs on the source. Nothing is mapped and no fault is served. Allowed
   * in state `idle`, once connected. The state is `ahead` until every page is here or it is held (then `idle` again,
   * onEdge), the connection is lost, or the session has failed. While it is under way, a call takes holdAhead back.
   */
  fetchAhead(): void;
  /** Ends fetchAhead before every page is here: the state is `idle` when what was in flight has come. */
  holdAhead(): void;
  /**
   * Reads the source's dirty maps, which must be of this round, and makes those pages absent again. Only in state
   * `idle`, before serveDemand and start. Off the main thread.
   */
  takeBack(round: number): Promise<{ readonly pages: number }>;
  /** Starts serving faults, if serveDemand has not done so, and prefetches once the source's data map is ready. */
  start(): void;
  /** Serves faults and fetches nothing else until start(). For the load of the device state, before the VM runs. */
  serveDemand(): void;
  snapshot(): TargetSnapshot;
  /** Resolves when the session's threads have ended and its files are closed. */
  close(): Promise<void>;
}

export interface TargetOptions {
  readonly regions: readonly (RegionFile & { readonly presencePath: string })[];
  /** Prefetch only; 0 for no limit. */
  readonly bandwidthBytesPerS: number;
  /** What prefetch begins with. Absent: the first page. */
  readonly order?: TouchOrder;
  /** Take over the presence maps of an earlier process. */
  readonly isResume: boolean;
  /** That process has fetched ahead: an absent page may have old bytes in its file, so no data map makes it zero. */
  readonly hasFetchedAhead?: boolean;
  readonly tags?: ArrivalTags;
  readonly onEdge: () => void;
}

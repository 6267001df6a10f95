/** The messages between source, target and coordinator of a migration. */
import type { DataSecurity } from '../../domain/data-security.js';
import type { GuestEnd } from '../../domain/guest-end.js';
import type { MigrationMode } from '../../domain/migration.js';
import type { Transport } from '../../domain/transport.js';
import type { Accel, VmSpec } from '../../domain/vm.js';

export interface RegionKeysPort {
  readonly ram: string;
  readonly dataMap: string;
  /** Of a host that may lack pages of the region: which ones it has. */
  readonly presence?: string;
  /** Of a VM whose writes are tracked: which pages it has written since the last round. */
  readonly dirtyMap?: string;
}

export interface SourceEndpointInfo {
  readonly transport: Transport;
  readonly host: string;
  readonly port: number;
  readonly keys: readonly RegionKeysPort[];
  /** The least that the source accepts. Absent: its build may be older than that. */
  readonly dataSecurity?: DataSecurity;
}

export interface PrepareRequest {
  readonly session: string;
  readonly job: string;
  readonly spec: VmSpec;
  readonly source: string;
  readonly epoch: number;
  /** The id of the VM's start. Absent: the VM has none, or one of the hosts is of build 0.1.0. */
  readonly incarnation?: string;
  readonly mode: MigrationMode;
  readonly accel: Accel;
  /** Secret of this session (64 hex digits). The target presents it on the data port. */
  readonly token: string;
  readonly bandwidthBytesPerS: number;
  /** The key (64 hex digits) under which each page is tagged as it arrives. Absent: the memory is not verified. */
  readonly memoryKey?: string;
}

/** A part of a VM's memory, in chunks of CHUNK_BYTES, or of one page where pages are larger. */
export interface ChunkRange {
  /** The index of the region in the VM's spec. */
  readonly region: number;
  readonly first: number;
  readonly count: number;
}

/** The digests of a range, DIGEST_BYTES for each chunk, in base64. */
export interface FrozenDigests {
  readonly digests: string;
}

/** Null: it cannot be said any more what has arrived, and `reason` says why. */
export interface ArrivedDigests {
  readonly digests: string | null;
  readonly reason?: string;
}

/** One reading of which pages the VM has written since the one before. Rounds count from 1. */
export interface DirtyRound {
  readonly round: number;
  readonly dirtyPages: number;
  /** Of them, how many the round before has named, too. 0 in the last round. */
  readonly againPages: number;
}

export interface PrepareReply {
  /** Null. Earlier builds need it; in native modes they answer with a port where QEMU takes its stream from anybody. */
  readonly nativeUri: string | null;
}

export const SESSION_STATES = [
  'prepared',
  'connected',
  'loaded',
  'filling',
  'disconnected',
  'complete',
  'failed',
  'gone',
] as const;
export type SessionState = (typeof SESSION_STATES)[number];

export interface SessionProgress {
  readonly state: SessionState;
  /** `resume` has taken effect: the VM runs or has run here. */
  readonly hasRun: boolean;
  readonly error: unknown;
  readonly pagesTotal: number;
  readonly pagesPresent: number;
  readonly pageBytes: number;
  readonly counters: Readonly<Record<string, number>>;
  /** How the VM has ended, in state `gone`. Absent if the host does not know, or if its build is older. */
  readonly ended?: GuestEnd;
}

/** Facts about a VM that move with it and are not in its device state. */
export interface Legacy {
  /** The exit code that the guest wrote to its exit port. */
  readonly exitCode: number;
}

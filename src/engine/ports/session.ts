/** What the two halves of a migration and its coordinator tell each other. */
import type { MigrationMode } from '../../domain/migration.js';
import type { Transport } from '../../domain/transport.js';
import type { Accel, VmSpec } from '../../domain/vm.js';

export interface RegionKeysPort {
  readonly ram: string;
  readonly dataMap: string;
}

export interface SourceEndpointInfo {
  readonly transport: Transport;
  readonly host: string;
  readonly port: number;
  readonly keys: readonly RegionKeysPort[];
}

export interface PrepareRequest {
  readonly session: string;
  readonly job: string;
  readonly spec: VmSpec;
  readonly source: string;
  readonly epoch: number;
  readonly mode: MigrationMode;
  readonly accel: Accel;
  /** Secret of this session (64 hex digits); the target shows it on the data port. */
  readonly token: string;
  readonly bandwidthBytesPerS: number;
}

export interface PrepareReply {
  /** native modes: where QEMU listens for QEMU's own stream */
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
  /** Has `resume` taken effect: the VM runs or has run here. */
  readonly hasRun: boolean;
  readonly error: unknown;
  readonly pagesTotal: number;
  readonly pagesPresent: number;
  readonly pageBytes: number;
  readonly counters: Readonly<Record<string, number>>;
}

/** What a VM that has moved keeps of its life before. */
export interface Legacy {
  /** As its guest wrote it to its exit port. */
  readonly exitCode: number;
}

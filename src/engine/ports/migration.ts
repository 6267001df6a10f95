/**
 * Everything the engine needs from the world, as interfaces: agents on hosts, the registry, the journal, time. The daemon plugs in the real
 * ones, test/sim plugs in simulated ones; the engine cannot tell.
 *
 * Rules that every implementation keeps:
 *  - Each call is idempotent for the same session: the coordinator may repeat it after a crash or a lost answer.
 *  - A call that throws may or may not have taken effect; the engine undoes as if it had.
 *  - An error carries a MigrationError code. UNREACHABLE, TIMEOUT and DISCONNECTED may pass; others are final.
 *  - `discard`, `unexpose` and `release` are final for their session: a `prepare`, `connect` or `expose` that arrives late (its caller has long
 *    given up) fails with CONFLICT and brings nothing back. An undo call for something that is not there succeeds.
 */

import type { ForkPlan, ForkReport, ForkStepName } from '../../domain/fork.js';
import type { HostInventory, TargetChecks, VmInventory } from '../../domain/host.js';
import type { JobState } from '../../domain/job.js';
import type { MigrationPlan, MigrationReport, MigrationRequest, StepName } from '../../domain/migration.js';
import type { RdmaPlace, Transport } from '../../domain/transport.js';
import type { VmSpec } from '../../domain/vm.js';

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
  readonly mode: 'postcopy' | 'native-precopy' | 'native-postcopy';
  readonly accel: 'kvm' | 'tcg';
  /** Secret of this session (64 hex digits); the target shows it on the data port. */
  readonly token: string;
  readonly bandwidthBytesPerS: number;
}

export interface PrepareReply {
  /** native modes: where QEMU listens for QEMU's own stream */
  readonly nativeUri: string | null;
}

export type SessionState =
  | 'prepared'
  | 'connected'
  | 'loaded'
  | 'filling'
  | 'disconnected'
  | 'complete'
  | 'failed'
  | 'gone';

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

/** What one host does in a migration. Source calls go to the host the VM leaves, target calls to the one it arrives at. */
export interface AgentPort {
  readonly host: string;
  inventory(): Promise<HostInventory>;
  vmInventory(vm: string): Promise<VmInventory>;
  /** `source`: where it listens for RDMA, if it is to be found out whether this host gets there. */
  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks>;

  // target
  /** Region files, presence maps, QEMU `-incoming defer` with the preload, registered. The VM cannot run yet. */
  prepare(request: PrepareRequest): Promise<PrepareReply>;
  connect(session: string, source: SourceEndpointInfo): Promise<void>;
  /** The target's promise that device state is loaded and that it will wait for resume. Rejects when loading failed. */
  awaitLoaded(session: string): Promise<void>;
  /** After commit only: note ownership at `epoch`, start serving faults, run. Repeating it is harmless. */
  resume(session: string, epoch: number): Promise<{ readonly resumedAtUs: number }>;
  progress(session: string): Promise<SessionProgress>;
  /** After commit, when the data connection is lost: connect again with fresh keys. */
  reconnect(session: string, source: SourceEndpointInfo): Promise<void>;
  /** After the commit: what the source's record says of the VM and no device state holds. */
  inherit(session: string, legacy: Legacy): Promise<void>;
  /** The session is over and complete: forget it, keep the VM. */
  finish(session: string): Promise<void>;
  /**
   * Before commit: kill QEMU, remove files, forget. Never touches a VM that has been resumed: throws CONFLICT then.
   */
  discard(session: string): Promise<void>;

  // source
  /** Takes the VM for this job; VM_BUSY if another has it. */
  reserve(vm: string, job: string): Promise<void>;
  unreserve(vm: string, job: string): Promise<void>;
  /** `target`: the host it will go to; the connection for the device state is opened beforehand. */
  expose(request: {
    session: string;
    vm: string;
    token: string;
    transport: Transport;
    target: string;
  }): Promise<SourceEndpointInfo>;
  unexpose(session: string): Promise<void>;
  /**
   * Stops the vCPUs and freezes the memory for the session. The VM runs on for some milliseconds of this call (QEMU's stream is set up
   * meanwhile), so the blackout begins `stoppedForMs` before the call answered, not when it was made. `stoppedAtUs`: QEMU's wall clock.
   */
  stop(vm: string, session: string): Promise<{ readonly stoppedAtUs: number; readonly stoppedForMs: number }>;
  /**
   * Undo of stop: the VM runs again. Throws OWNER_CHANGED if it does not belong to this host any more, and CONFLICT if another session has
   * stopped it since: an undo that comes late must not let it run while that one may be committed.
   */
  continueVm(vm: string, session: string): Promise<void>;
  /** Device state from our QEMU to the target's, streamed host to host; resolves when all of it has been handed over. */
  transferState(vm: string, session: string, target: string): Promise<{ readonly deviceStateBytes: number }>;
  /** QEMU's own migration towards `uri`; resolves when the VM is stopped at the source and the target holds what it needs to run. */
  nativeMigrate(
    vm: string,
    session: string,
    options: { uri: string; isPostcopy: boolean; bandwidthBytesPerS: number; downtimeMsMax: number },
  ): Promise<void>;
  /**
   * `query-migrate` in our words, all optional: status (QEMU's), ramTotalBytes, ramTransferredBytes, ramRemainingBytes, bytesPerS, rounds,
   * downtimeMs (QEMU's own reading of how long the source has been stopped when nativeMigrate resolved).
   */
  nativeProgress(vm: string): Promise<Readonly<Record<string, number | string>>>;
  nativeCancel(vm: string, session: string): Promise<void>;
  /** The counters of the source's half, for the report. */
  sourceCounters(session: string): Promise<Readonly<Record<string, number>>>;
  /** After drain: end QEMU, remove region files, forget the VM here. */
  release(vm: string, session: string): Promise<void>;
}

// ---- registry ---------------------------------------------------------------------------------------------------------------------------

export interface OwnerRecord {
  readonly vm: string;
  readonly owner: string;
  /** Grows by one with each change of owner. */
  readonly epoch: number;
  /** Session whose commit made it so; null for a VM started here. */
  readonly session: string | null;
}

/** Small durable records with compare-and-swap. What `put` has answered survives a crash of the machine. */
export interface Registry {
  owner(vm: string): Promise<OwnerRecord | null>;
  /**
   * Makes `next` the record if the present one has `expectedEpoch` (null: there is none). OWNER_CHANGED otherwise. Durable when it resolves.
   */
  swapOwner(vm: string, expectedEpoch: number | null, next: OwnerRecord): Promise<void>;
  removeOwner(vm: string, expectedEpoch: number): Promise<void>;
  /** Of the present record, or of the last one that there was; 0 if none is known. A VM that is started goes on from it. */
  lastEpoch(vm: string): Promise<number>;
  owners(): Promise<readonly OwnerRecord[]>;
}

// ---- journal ----------------------------------------------------------------------------------------------------------------------------

/** A step of a migration or of a fork: all lines of one job are of one kind, which its first line says. */
export type AnyStepName = StepName | ForkStepName;

/** Appended before the act it announces; durable when the promise resolves. Replay is in order. */
export type JournalEntry =
  /** A fork begins, as `job` is the beginning of a migration. */
  | {
      readonly type: 'fork';
      readonly job: string;
      readonly fork: string;
      readonly plan: ForkPlan;
      readonly createdAt: string;
    }
  | {
      readonly type: 'job';
      readonly job: string;
      readonly session: string;
      readonly token: string;
      readonly plan: MigrationPlan;
      readonly spec: VmSpec;
      readonly epoch: number;
      readonly accel: 'kvm' | 'tcg';
      readonly createdAt: string;
    }
  | {
      readonly type: 'begin';
      readonly job: string;
      readonly step: AnyStepName;
      /** Steps announced together with `step`, so that no fsync falls into the blackout but the commit's own, or between two clones. */
      readonly group?: readonly AnyStepName[];
      readonly at?: string;
    }
  | {
      readonly type: 'end';
      readonly job: string;
      readonly step: AnyStepName;
      readonly ms: number;
      readonly result?: unknown;
    }
  | { readonly type: 'undo'; readonly job: string; readonly step: AnyStepName }
  /** The undo of `step` could not be done (its host does not answer); it is tried again until `cleared`, whatever state the job is in. */
  | { readonly type: 'leftover'; readonly job: string; readonly step: AnyStepName }
  | { readonly type: 'cleared'; readonly job: string; readonly step: AnyStepName }
  | {
      readonly type: 'state';
      readonly job: string;
      readonly state: JobState;
      readonly report?: MigrationReport | ForkReport;
      readonly error?: unknown;
      readonly at?: string;
    };

export interface Journal {
  append(entry: JournalEntry): Promise<void>;
}

// ---- non-determinism --------------------------------------------------------------------------------------------------------------------

export interface Clock {
  /** Monotonic, milliseconds with fractions. */
  nowMs(): number;
  /** Wall clock, ISO 8601. */
  isoNow(): string;
  /** Resolves after `ms`; an aborted signal ends it early, by resolving or rejecting. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
}

export interface Random {
  /** Unguessable, lower-case hex. */
  hex(bytes: number): string;
}

/** Where a test may crash, park or fail the coordinator: before and after each step ("before:commit", "after:commit", "undo:stopSource"). */
export interface FaultPort {
  hit(point: string): Promise<void>;
}

/** What the walk of a job of any kind needs. */
export interface WalkPorts {
  readonly journal: Journal;
  readonly clock: Clock;
  readonly faults: FaultPort;
}

export interface EnginePorts extends WalkPorts {
  readonly source: AgentPort;
  readonly target: AgentPort;
  readonly registry: Registry;
}

export interface EngineRequest {
  readonly job: string;
  readonly session: string;
  readonly token: string;
  readonly request: MigrationRequest;
}

import type { Transport } from '../../domain/transport.js';
import type { ChunkRange, DirtyRound, FrozenDigests, SourceEndpointInfo } from './session.js';

export interface ExposeRequest {
  readonly session: string;
  readonly vm: string;
  /** Secret of the session (64 hex digits). The target presents it on the data port. */
  readonly token: string;
  readonly transport: Transport;
  /** The host that the VM moves to. The connection for the device state is opened to it beforehand. */
  readonly target: string;
  /** Note which pages the VM writes from now on. Absent: the target fetches nothing while the VM runs here. */
  readonly isTracked?: boolean;
}

export interface StopReply {
  /** The stop by QEMU's wall clock. */
  readonly stoppedAtUs: number;
  readonly stoppedForMs: number;
  /** The last round. Only of a session whose writes are tracked. */
  readonly dirty?: DirtyRound;
}

export interface NativeMigrateOptions {
  /** The host that waits for the stream of this session. */
  readonly target: string;
  readonly isPostcopy: boolean;
  readonly bandwidthBytesPerS: number;
  readonly downtimeMsMax: number;
}

/** The calls to the source of a migration. The rules are in host.ts. */
export interface SourcePort {
  /** Reserves the VM for this job. Throws VM_BUSY if another job has it. */
  reserve(vm: string, job: string): Promise<void>;
  unreserve(vm: string, job: string): Promise<void>;
  expose(request: ExposeRequest): Promise<SourceEndpointInfo>;
  unexpose(session: string): Promise<void>;
  /**
   * Notes which pages the VM has written since the last round, for the target to give up its copies of them. Each call
   * makes a round, and no two rounds tell of the same write. So a round whose number has not reached the target would
   * be lost, with writes in it: a caller that gets no answer must undo the move, and not ask again.
   */
  noteDirty(vm: string, session: string): Promise<DirtyRound>;
  /**
   * Stops the vCPUs and freezes the memory for the session. The VM still runs for some milliseconds of this call, while
   * QEMU sets up its stream. So the blackout begins `stoppedForMs` before the call returns, not when it is made. If the
   * writes of the VM are tracked, the last round of them is noted before the call returns.
   */
  stop(vm: string, session: string): Promise<StopReply>;
  /**
   * Undoes `stop`: the VM runs again. Throws OWNER_CHANGED if the VM no longer belongs to this host, and CONFLICT if
   * another session has stopped it since. A late undo must not run the VM while that other session may be committed.
   */
  continueVm(vm: string, session: string): Promise<void>;
  /**
   * Streams the device state from the QEMU of this host to that of the target. Resolves when all of it has been handed
   * over.
   */
  transferState(vm: string, session: string, target: string): Promise<{ readonly deviceStateBytes: number }>;
  /**
   * Runs QEMU's own migration to `uri`. Resolves when the VM is stopped on the source and the target has what it needs
   * to run.
   */
  nativeMigrate(vm: string, session: string, options: NativeMigrateOptions): Promise<void>;
  /**
   * Returns the readings of `query-migrate` under names of our own. All are optional: status (QEMU's), ramTotalBytes,
   * ramTransferredBytes, ramRemainingBytes, bytesPerS, rounds, and downtimeMs (by QEMU's own reading, how long the
   * source had been stopped when nativeMigrate resolved).
   */
  nativeProgress(vm: string): Promise<Readonly<Record<string, number | string>>>;
  /** Connects a post-copy of QEMU again whose stream was lost. Resolves when pages are sent again. */
  nativeRecover(vm: string, session: string, target: string): Promise<void>;
  nativeCancel(vm: string, session: string): Promise<void>;
  /** Digests memory of a VM that has left, under the key of its move. */
  digestFrozen(session: string, key: string, range: ChunkRange): Promise<FrozenDigests>;
  /** Returns the counters of the source for the report. */
  sourceCounters(session: string): Promise<Readonly<Record<string, number>>>;
  /** Ends QEMU, removes the region files and forgets the VM here, once the target has everything. */
  release(vm: string, session: string): Promise<void>;
}

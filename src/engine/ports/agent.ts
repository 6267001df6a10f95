/**
 * Everything the engine needs from the world, as interfaces: agents on hosts, the registry, the journal, time. The
 * daemon plugs in the real ones, test/sim plugs in simulated ones; the engine cannot tell.
 *
 * Rules that every implementation keeps:
 *  - Each call is idempotent for the same session: the coordinator may repeat it after a crash or a lost answer.
 *  - A call that throws may or may not have taken effect; the engine undoes as if it had.
 *  - An error carries a MigrationError code. UNREACHABLE, TIMEOUT and DISCONNECTED may pass; others are final.
 *  - `discard`, `unexpose` and `release` are final for their session: a `prepare`, `connect` or `expose` that arrives
 *    late (its caller has long given up) fails with CONFLICT and brings nothing back. An undo call for something that
 *    is not there succeeds.
 */
import type { HostInventory, TargetChecks, VmInventory } from '../../domain/host.js';
import type { RdmaPlace, Transport } from '../../domain/transport.js';
import type { VmSpec } from '../../domain/vm.js';
import type { Legacy, PrepareReply, PrepareRequest, SessionProgress, SourceEndpointInfo } from './session.js';

/**
 * What one host does in a migration. Source calls go to the host the VM leaves, target calls to the one it arrives at.
 */
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
   * Stops the vCPUs and freezes the memory for the session. The VM runs on for some milliseconds of this call (QEMU's
   * stream is set up meanwhile), so the blackout begins `stoppedForMs` before the call answered, not when it was made.
   * `stoppedAtUs`: QEMU's wall clock.
   */
  stop(vm: string, session: string): Promise<{ readonly stoppedAtUs: number; readonly stoppedForMs: number }>;
  /**
   * Undo of stop: the VM runs again. Throws OWNER_CHANGED if it does not belong to this host any more, and CONFLICT if
   * another session has stopped it since: an undo that comes late must not let it run while that one may be committed.
   */
  continueVm(vm: string, session: string): Promise<void>;
  /**
   * Device state from our QEMU to the target's, streamed host to host; resolves when all of it has been handed over.
   */
  transferState(vm: string, session: string, target: string): Promise<{ readonly deviceStateBytes: number }>;
  /**
   * QEMU's own migration towards `uri`; resolves when the VM is stopped at the source and the target holds what it
   * needs to run.
   */
  nativeMigrate(
    vm: string,
    session: string,
    options: { uri: string; isPostcopy: boolean; bandwidthBytesPerS: number; downtimeMsMax: number },
  ): Promise<void>;
  /**
   * `query-migrate` in our words, all optional: status and errorText (QEMU's), ramTotalBytes, ramTransferredBytes,
   * ramRemainingBytes, bytesPerS, rounds, downtimeMs (QEMU's own reading of how long the source has been stopped when
   * nativeMigrate resolved).
   */
  nativeProgress(vm: string): Promise<Readonly<Record<string, number | string>>>;
  nativeCancel(vm: string, session: string): Promise<void>;
  /** The counters of the source's half, for the report. */
  sourceCounters(session: string): Promise<Readonly<Record<string, number>>>;
  /** After drain: end QEMU, remove region files, forget the VM here. */
  release(vm: string, session: string): Promise<void>;
}

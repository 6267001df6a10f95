import type { Transport } from '../../domain/transport.js';
import type { SourceEndpointInfo } from './session.js';

export interface ExposeRequest {
  readonly session: string;
  readonly vm: string;
  /** Secret of the session (64 hex digits); the target shows it on the data port. */
  readonly token: string;
  readonly transport: Transport;
  /** The host that the VM will go to; the connection for the device state is opened beforehand. */
  readonly target: string;
}

export interface NativeMigrateOptions {
  readonly uri: string;
  readonly isPostcopy: boolean;
  readonly bandwidthBytesPerS: number;
  readonly downtimeMsMax: number;
}

/** What the host that a VM leaves does in its migration. The rules are in host.ts. */
export interface SourcePort {
  /** Takes the VM for this job; VM_BUSY if another has it. */
  reserve(vm: string, job: string): Promise<void>;
  unreserve(vm: string, job: string): Promise<void>;
  expose(request: ExposeRequest): Promise<SourceEndpointInfo>;
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
  nativeMigrate(vm: string, session: string, options: NativeMigrateOptions): Promise<void>;
  /**
   * `query-migrate` in our words, all optional: status (QEMU's), ramTotalBytes, ramTransferredBytes, ramRemainingBytes,
   * bytesPerS, rounds, downtimeMs (QEMU's own reading of how long the source has been stopped when nativeMigrate
   * resolved).
   */
  nativeProgress(vm: string): Promise<Readonly<Record<string, number | string>>>;
  nativeCancel(vm: string, session: string): Promise<void>;
  /** The counters of the source's half, for the report. */
  sourceCounters(session: string): Promise<Readonly<Record<string, number>>>;
  /** When the target has everything: end QEMU, remove region files, forget the VM here. */
  release(vm: string, session: string): Promise<void>;
}

import type { Legacy, PrepareReply, PrepareRequest, SessionProgress, SourceEndpointInfo } from './session.js';

/** What the host that a VM arrives at does in its migration. The rules are in host.ts. */
export interface TargetPort {
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
}

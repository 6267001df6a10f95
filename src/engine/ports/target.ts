import type {
  ArrivedDigests,
  ChunkRange,
  Legacy,
  PrepareReply,
  PrepareRequest,
  SessionProgress,
  SourceEndpointInfo,
} from './session.js';

/** The calls to the target of a migration. The rules are in host.ts. */
export interface TargetPort {
  /**
   * Creates region files and presence maps, and starts QEMU with `-incoming defer` and the preload, registered for
   * faults. The VM cannot run yet.
   */
  prepare(request: PrepareRequest): Promise<PrepareReply>;
  connect(session: string, source: SourceEndpointInfo): Promise<void>;
  /** Resolves when the device state is loaded and the VM waits for `resume`. Rejects if loading fails. */
  awaitLoaded(session: string): Promise<void>;
  /** Notes ownership at `epoch`, starts serving faults and runs the VM. Only after the commit. It may be repeated. */
  resume(session: string, epoch: number): Promise<{ readonly resumedAtUs: number }>;
  progress(session: string): Promise<SessionProgress>;
  /** Connects again with fresh keys, after the commit, if the data connection is lost. */
  reconnect(session: string, source: SourceEndpointInfo): Promise<void>;
  /** Takes over, after the commit, the facts from the source's VM record that are not in the device state. */
  inherit(session: string, legacy: Legacy): Promise<void>;
  /** Digests what has arrived, as it arrived, under the key of `prepare`. Only when the session is complete. */
  digestArrived(session: string, range: ChunkRange): Promise<ArrivedDigests>;
  /** Stops the VM for good, because its memory is not what it was on the source. A user ends it. */
  condemn(session: string, damage: string): Promise<void>;
  /** Forgets a complete session and keeps the VM. */
  finish(session: string): Promise<void>;
  /**
   * Kills QEMU, removes the files and forgets the session, before the commit. Throws CONFLICT, and changes nothing, if
   * the VM has been resumed.
   */
  discard(session: string): Promise<void>;
}

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
/** Nothing may be in flight before pages are taken back. On a slow link that takes its time. */
export const HOLD_MS_MAX = 10_000;

export interface FetchedAhead {
  /** All pages are here. */
  readonly isDone: boolean;
  /** Nothing is in flight, so pages may be taken back. False if fetching goes on, or waits for a connection. */
  readonly isHeld: boolean;
}

export interface TargetPort {
  /**
   * Creates region files and presence maps, and starts QEMU with `-incoming defer` and the preload, registered for
   * faults. The VM cannot run yet.
   */
  prepare(request: PrepareRequest): Promise<PrepareReply>;
  connect(session: string, source: SourceEndpointInfo): Promise<void>;
  /**
   * Fetches the missing pages while the VM still runs on the source: begins, or goes on. Resolves when all are here, or
   * after about `msMax`, so that the caller can watch what arrives. `holds`: pages are taken back after that, so the
   * fetching is held then, until the next call.
   */
  fetchAhead(session: string, msMax: number, holds: boolean): Promise<FetchedAhead>;
  /**
   * Gives up the pages that the VM has written before this round was noted: they are missing again. Every round must be
   * taken, in turn. To repeat the last one changes nothing and gives the same answer.
   */
  takeBack(session: string, round: number): Promise<{ readonly pages: number }>;
  /**
   * Resolves when the device state is loaded and the VM waits for `resume`. Rejects if loading fails. `lastRound` is
   * that of the stopped VM, if pages were fetched while it ran. It is taken back first: before that QEMU gets no byte
   * of the device state, because a device may read memory while it loads.
   */
  awaitLoaded(session: string, lastRound?: number): Promise<void>;
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

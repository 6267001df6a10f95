/**
 * What a host does to make many VMs of one. The rules are in host.ts.
 *
 *   prepareClones ──► armParent ──► forkPoint ──► startClones ──► commitFork ──► progress .. complete ──► finishFork
 *        └────────────────┴─────────────┴──────────────┴── discardFork: the parent runs on, unprotected; no clone,
 *        image or overlay is left
 *
 * A fork and its image have the same id.
 */
import type {
  CloneDisks,
  CloneFailure,
  CloneIdentity,
  CloneMemory,
  CloneNetwork,
  ParentMode,
} from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';

export interface PrepareForkRequest {
  /** Of the fork and the image: 16 hex digits. With `image` the image is that one, and this is the fork's id alone. */
  readonly fork: string;
  readonly job: string;
  readonly vm: string | null;
  readonly image: string | null;
  readonly cloneCount: number;
  readonly namePrefix: string | null;
  readonly parentMode: ParentMode;
  readonly memory: CloneMemory;
  readonly network: CloneNetwork;
  readonly disks: CloneDisks;
  readonly isPartialAllowed: boolean;
}

/** What pre-flight knows of a fork that it asks about. */
export type ForkQuestion = Omit<PrepareForkRequest, 'fork' | 'job' | 'isPartialAllowed'>;

export interface PrepareForkReply {
  /** Of the image: another than the fork's where waiting processes were made for an image of theirs. */
  readonly image: string;
  readonly isWarm: boolean;
  readonly clones: readonly CloneIdentity[];
  /** Their errors are JSON, as all that may come from another host. */
  readonly failures: readonly CloneFailure[];
}

export interface ForkPointReply {
  /** STOP to RESUME by QEMU's clock; to the end of the call where the parent stays stopped. */
  readonly parentPauseMs: number;
  readonly deviceStateBytes: number;
  /** Parts of the pause, for the report. */
  readonly parts: readonly { readonly name: string; readonly ms: number }[];
}

export interface StartClonesReply {
  /** When each clone's QEMU had resumed, counted from the beginning of this call. */
  readonly ready: readonly { readonly index: number; readonly atMs: number }[];
  readonly failures: readonly CloneFailure[];
}

/** What was committed: the answers of the steps before, for a coordinator whose journal lacks them. */
export interface CommittedFork {
  readonly image: string;
  readonly isWarm: boolean;
  /** Those that ran. */
  readonly clones: readonly CloneIdentity[];
  readonly failures: readonly CloneFailure[];
  readonly parentPauseMs: number;
  readonly deviceStateBytes: number;
  /** When each clone's QEMU had resumed, by the wall clock: the only one that two daemon lives share. */
  readonly ready: readonly { readonly index: number; readonly at: string }[];
}

export interface ForkProgress {
  /** failed: for ever. Its clones have been ended, because they would wait for pages that never come. */
  readonly state: 'filling' | 'complete' | 'failed';
  readonly error: unknown;
  readonly pagesTotal: number;
  readonly pagesDone: number;
  readonly pageBytes: number;
  /** Of the native capture: copiedBytes, zeroBytes, parentFaultCount, cloneFaultCount, .. (src/protocol/wire.ts). */
  readonly counters: Readonly<Record<string, number>>;
  /** null before the commit. */
  readonly committed: CommittedFork | null;
}

export interface ForkPort {
  /** For pre-flight. NOT_FOUND if there is no such VM or image. */
  forkInventory(question: ForkQuestion): Promise<ForkInventory>;
  /**
   * The image's record and files, and a QEMU for each clone that waits for the state (from the pool where it has them).
   */
  prepareClones(request: PrepareForkRequest): Promise<PrepareForkReply>;
  /** The parent runs on: its memory is write-protected once, overlays for its disks are made. */
  armParent(fork: string): Promise<void>;
  /** Stop, device state, disk snapshot, protection of what was written since, resume. */
  forkPoint(fork: string): Promise<ForkPointReply>;
  /** Loads the state into every clone, gives it its identity, lets it run. */
  startClones(fork: string): Promise<StartClonesReply>;
  /**
   * Durable: from here on the clones are VMs of their own, and a restarted daemon finishes the image instead of
   * undoing.
   */
  commitFork(fork: string): Promise<void>;
  /** NOT_FOUND for one that has been finished, as for one that has never been. */
  forkProgress(fork: string): Promise<ForkProgress>;
  /**
   * The image is complete, or never will be: nothing of the fork is left but image and clones. CONFLICT before that.
   */
  finishFork(fork: string): Promise<void>;
  /** Before commitFork; CONFLICT after it. */
  discardFork(fork: string): Promise<void>;
}

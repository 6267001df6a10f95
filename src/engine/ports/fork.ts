/**
 * The calls to a host that make many VMs of one. The rules are in host.ts.
 *
 *   prepareClones ─► armParent ─► forkPoint ─► loadClones ─► commitFork ─► runClones ─► progress .. ─► finishFork
 *        └──────────────┴────────────┴────────────┴── discardFork: the parent runs on, unprotected; no clone, image or
 *        overlay is left
 *
 * No clone runs before the fork is committed, so a fork that is undone takes no clone that has run.
 *
 * A fork and its image have the same id.
 */

import type { DataSecurity } from '../../domain/data-security.js';
import type { HostFanout } from '../../domain/fanout.js';
import type {
  CloneDisks,
  CloneFailure,
  CloneIdentity,
  CloneMemory,
  CloneNetwork,
  DiskShare,
  ForkShare,
  ImageFetchMode,
  ParentMode,
} from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import type { Transport } from '../../domain/transport.js';
import type { Accel, DiskFormat, VmSpec } from '../../domain/vm.js';
import type { SourceEndpointInfo } from './session.js';

/** A disk of an image, as it was at the fork point. No VM writes to the file any more. */
export interface ImageDisk {
  readonly id: string;
  readonly path: string;
  readonly format: DiskFormat;
}

/** The image of a fork, for a host that joins the fork and does not have the image's parent. */
export interface ForkOrigin {
  /** The host that has the image, or takes it. */
  readonly host: string;
  readonly image: string;
  /** The parent's spec at the fork. */
  readonly spec: VmSpec;
  readonly accel: Accel;
  readonly qemuVersion: string;
  /** Memory that the image will take here. */
  readonly allocatedBytes: number;
  /** How that host gets at each disk of the spec. Absent: the spec has no disks. */
  readonly disks?: readonly DiskShare[];
  /** The least protection of its pages on their way. Absent: what the hosts demand. */
  readonly dataSecurity?: DataSecurity;
}

/** Where the pages of an image can be read, and the secret for it. */
export interface ImageHolder {
  readonly session: string;
  readonly token: string;
  readonly endpoint: SourceEndpointInfo;
  /** The disks of the image. A host that joins refuses other disks than those that it was told. Absent: none. */
  readonly disks?: readonly ImageDisk[];
}

export interface ImageDigests {
  /** DIGEST_BYTES for each page, in base64. Empty: they are not known yet. Null: they never will be. */
  readonly digests: string | null;
}

export interface PrepareForkRequest {
  /** Id of the fork and of its new image: 16 hex digits. If `image` is set, it is the id of the fork only. */
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
  /** True: ended VMs with the clones' names are removed. Absent: only names that no VM has are used. */
  readonly isReplacing?: boolean;
  /** The clones that this host makes; `cloneCount` is that of the whole fork. Absent: all. */
  readonly share?: ForkShare;
  /** Set on a host that joins the fork: its image is read from another host. */
  readonly origin?: ForkOrigin;
  /** How much of the image a host that joins reads. Absent: all. */
  readonly fetch?: ImageFetchMode;
  /** How a host that joins gets the image. Absent: all of it from its root. */
  readonly fanout?: HostFanout;
  /** All hosts of the fork, the root included: they may read the image from each other. Absent: only the root. */
  readonly hosts?: readonly string[];
}

/** The part of the request that pre-flight knows. With `origin` it asks a host that would join. */
export type ForkQuestion = Omit<PrepareForkRequest, 'fork' | 'job' | 'isPartialAllowed' | 'fetch' | 'fanout' | 'hosts'>;

export interface PrepareForkReply {
  /** Id of the image. It differs from the fork's id if the clones are waiting processes of an earlier image. */
  readonly image: string;
  readonly isWarm: boolean;
  readonly clones: readonly CloneIdentity[];
  /** The errors are JSON, like everything that may come from another host. */
  readonly failures: readonly CloneFailure[];
}

export interface ForkPointReply {
  /** Time from STOP to RESUME by QEMU's clock, or to the end of the call if the parent stays stopped. */
  readonly parentPauseMs: number;
  readonly deviceStateBytes: number;
  /** Parts of the pause, for the report. */
  readonly parts: readonly { readonly name: string; readonly ms: number }[];
}

export interface LoadClonesReply {
  /** The clones that are left out. */
  readonly failures: readonly CloneFailure[];
}

export interface RunClonesReply {
  /**
   * Time at which each clone's QEMU had resumed, counted from the beginning of this call. It is negative for a clone
   * that an earlier call has resumed.
   */
  readonly ready: readonly { readonly index: number; readonly atMs: number }[];
  /** The clones that could not be resumed. They have ended. */
  readonly failures: readonly CloneFailure[];
}

/** The committed fork: the results of the earlier steps, for a coordinator whose journal lacks them. */
export interface CommittedFork {
  readonly image: string;
  readonly isWarm: boolean;
  /** The clones that were loaded at the commit. */
  readonly clones: readonly CloneIdentity[];
  readonly failures: readonly CloneFailure[];
  readonly parentPauseMs: number;
  readonly deviceStateBytes: number;
  /**
   * Time at which each clone's QEMU had resumed, by the wall clock, which a daemon shares with its successor. Only the
   * clones that are known to have run are in it.
   */
  readonly ready: readonly { readonly index: number; readonly at: string }[];
}

export interface ForkProgress {
  /**
   * lazy: only what the clones touch is read, so that the fork can be finished. `failed` is final: the clones have been
   * ended, because they would wait for pages that never come, or stand still for good, because a page was wrong.
   */
  readonly state: 'filling' | 'lazy' | 'complete' | 'failed';
  readonly error: unknown;
  readonly pagesTotal: number;
  readonly pagesDone: number;
  readonly pageBytes: number;
  /** Counters of the native capture: copiedBytes, zeroBytes, parentFaultCount and so on (src/protocol/wire.ts). */
  readonly counters: Readonly<Record<string, number>>;
  /** Bytes of pages that came from other hosts than the root, by host. Absent: none. */
  readonly nearBytes?: Readonly<Record<string, number>>;
  /** Null before the commit. */
  readonly committed: CommittedFork | null;
}

export const FORK_DECISIONS = ['open', 'committed', 'discarded'] as const;
export type ForkDecision = (typeof FORK_DECISIONS)[number];

export interface ForkPort {
  /** Returns the facts for pre-flight. Throws NOT_FOUND if there is no such VM or image. */
  forkInventory(question: ForkQuestion): Promise<ForkInventory>;
  /**
   * Creates the record and files of the image, and a QEMU for each clone that waits for the device state. The QEMUs
   * come from the pool if it has them.
   */
  prepareClones(request: PrepareForkRequest): Promise<PrepareForkReply>;
  /** Write-protects the parent's memory once and creates overlays for its disks. The parent keeps running. */
  armParent(fork: string): Promise<void>;
  /**
   * Stops the parent, saves its device state, snapshots its disks, protects the pages written since armParent, and
   * resumes the parent.
   */
  forkPoint(fork: string): Promise<ForkPointReply>;
  /**
   * On the host that has the image, once the parent is armed: the host `reader` may read its pages. It gets none before
   * the fork point. While the image is captured, another transport may be used than the one that is asked for.
   * Repeated, it returns the same holder, unless the daemon has been restarted or the image has become complete. The
   * host that has asked counts as a reader until `endImage`.
   */
  serveImage(image: string, reader: string, transport: Transport): Promise<ImageHolder>;
  /**
   * On the host that has the image, for one of its readers: digests of the pages of a region (by its number) from
   * `firstPage` on, as many as the host likes. They are not known before the image is complete.
   */
  imageDigests(image: string, reader: string, region: number, firstPage: number): Promise<ImageDigests>;
  /** The host does not read the image any more. Idempotent. */
  endImage(image: string, reader: string): Promise<void>;
  /**
   * On a host that joins: connects to the host that has the image, over this transport, now and after each loss of the
   * connection.
   */
  connectImage(fork: string, transport: Transport): Promise<void>;
  /**
   * On a host that reads only what its clones touch: reads the rest of the image, too. It returns at once. On any other
   * host that fills the image it changes nothing. Throws NOT_FOUND, or CONFLICT if the image cannot become complete.
   */
  completeImage(image: string): Promise<void>;
  /**
   * On the host that has the image, after the fork point: sends the device state to a host that joins, which loads it
   * into its clones at once. Its answer is that of `loadClones` there.
   */
  sendForkState(fork: string, host: string): Promise<LoadClonesReply>;
  /**
   * Loads the state into every clone. No vCPU runs. If one clone fails, all do, unless the request allows a part of
   * them. Repeated, it gives the same answer.
   */
  loadClones(fork: string): Promise<LoadClonesReply>;
  /**
   * Commits the fork durably. From here on it is never undone, and a restarted daemon continues it. No clone has run.
   * The coordinator calls it on the host whose record decides only.
   */
  commitFork(fork: string): Promise<void>;
  /**
   * Lets the clones of a committed fork run. A clone that has run is left alone, so a repeated call does the rest. A
   * clone that cannot be resumed is ended; the others run. Throws CONFLICT before the commit.
   *
   * `decision`: on a host that joined, what the record of the root says. The host then commits its own part first, as
   * durably as by `commitFork`. It throws CONFLICT if that part is discarded, or its clones have not been loaded.
   */
  runClones(fork: string, decision?: 'committed'): Promise<RunClonesReply>;
  /** Throws NOT_FOUND for a fork that is finished or never existed. */
  forkProgress(fork: string): Promise<ForkProgress>;
  /**
   * Removes everything of the fork but image and clones. Throws CONFLICT while the image may still become complete, or
   * clones have not run. On a host that reads only what its clones touch the reading goes on without the fork.
   */
  finishFork(fork: string): Promise<void>;
  /**
   * On the host whose record decides: whether the fork is committed. A host that joined and hears nothing asks this.
   * `discarded` is final: the fork was undone, or it has ended and
   * the host that asks was left out.
   */
  forkDecision(fork: string): Promise<{ readonly decision: ForkDecision }>;
  /** Undoes a fork before commitFork. Throws CONFLICT after it. */
  discardFork(fork: string): Promise<void>;
}

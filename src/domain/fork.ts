/**
 * The words of cloning as types, beside domain.ts. A fork takes an image (an immutable memory snapshot with device
 * state and disks) of a VM and runs clones on it. Imports nothing but domain.ts; every layer may import it.
 */
import type { PhaseTime } from './progress.js';

/**
 * continue: the parent runs on, its pages are copied. stop: it stays stopped, and its memory files are the image,
 * without a copy.
 */
export const PARENT_MODES = ['continue', 'stop'] as const;
export type ParentMode = (typeof PARENT_MODES)[number];

/**
 * cow: the image, mapped privately. private: a shared file of the clone's own, filled from the image, so that it is an
 * ordinary VM.
 */
export const CLONE_MEMORIES = ['cow', 'private'] as const;
export type CloneMemory = (typeof CLONE_MEMORIES)[number];

/**
 * fresh: each NIC is replaced by one with a MAC of its own, on the parent's bridge. isolated: each clone has a network
 * namespace with such bridges, and keeps the parent's MAC. none: the NICs are there and connected to nothing.
 */
export const CLONE_NETWORKS = ['fresh', 'isolated', 'none'] as const;
export type CloneNetwork = (typeof CLONE_NETWORKS)[number];

/**
 * overlay: a qcow2 of its own on the parent's disks, removed with the clone. scratch: writes are dropped when the clone
 * ends.
 */
export const CLONE_DISKS = ['overlay', 'scratch'] as const;
export type CloneDisks = (typeof CLONE_DISKS)[number];

export const CLONES_MAX = 1024;

export interface ForkRequest {
  /** The VM to fork; null: `image` is run as it is. */
  readonly vm: string | null;
  /** An image that is there already; null: one is taken of `vm`. */
  readonly image: string | null;
  readonly cloneCount: number;
  /** Clones are called PREFIX-0 and so on. null: the parent's name with the image's id. */
  readonly namePrefix: string | null;
  readonly parentMode: ParentMode;
  readonly memory: CloneMemory;
  readonly network: CloneNetwork;
  readonly disks: CloneDisks;
  /** false: all clones or none. true: those that can be started, and a list of the others. */
  readonly isPartialAllowed: boolean;
}

/**
 * What makes two clones startable by the same waiting QEMU processes: everything that stands on their command lines. A
 * set of waiting processes (src/agent/fork/pool.ts) is kept for one shape, clone count included, because each process
 * knows its index and the count from its start.
 */
export interface CloneIdentity {
  /** 0 .. cloneCount - 1 */
  readonly index: number;
  readonly cloneCount: number;
  readonly name: string;
  readonly uuid: string;
  readonly vmGenerationId: string;
  /** By NIC id: the MAC that the clone has once it runs. */
  readonly macs: Readonly<Record<string, string>>;
}

export const FORK_STEPS = [
  'reserveParent',
  'prepareClones',
  'armParent',
  'forkPoint',
  'startClones',
  'commitFork',
  'fillImage',
  'releaseParent',
] as const;
export type ForkStepName = (typeof FORK_STEPS)[number];

export interface ForkStep {
  readonly name: ForkStepName;
  readonly host: string;
  /** One line for --dry-run. */
  readonly text: string;
  /** The parent stands still in it. */
  readonly isInPause: boolean;
  readonly timeoutMs: number;
}

export interface ForkPlan {
  readonly request: ForkRequest;
  readonly host: string;
  readonly parent: string;
  readonly memoryBytes: number;
  readonly steps: readonly ForkStep[];
  readonly notes: readonly string[];
}

export interface CloneReport extends CloneIdentity {
  readonly host: string;
  /** First MAC, or null without a NIC. */
  readonly mac: string | null;
  /** From the request until its QEMU has resumed. */
  readonly readyMs: number;
}

export interface CloneFailure {
  readonly index: number;
  readonly name: string;
  readonly error: unknown;
}

export interface ForkReport {
  readonly job: string;
  readonly image: string;
  readonly parent: string;
  /** The parent's vCPUs stood still, by QEMU's STOP and RESUME events; 0 where an image that was there is run. */
  readonly parentPauseMs: number;
  /** The clones' QEMU processes were waiting already. */
  readonly isWarm: boolean;
  readonly totalMs: number;
  readonly firstReadyMs: number;
  readonly lastReadyMs: number;
  readonly memoryBytes: number;
  readonly clones: readonly CloneReport[];
  readonly failures: readonly CloneFailure[];
  readonly bytes: {
    readonly copied: number;
    readonly zeroSkipped: number;
    readonly deviceState: number;
    /** By host: image bytes that arrived there; on the parent's own host those copied. */
    readonly perHost: Readonly<Record<string, number>>;
    readonly rootEgress: number;
    readonly multicast: number;
    readonly repair: number;
  };
  readonly faults: {
    /** Writes of the parent that had to wait until a page was copied. */
    readonly parent: number;
    readonly clones: number;
  };
  readonly phases: readonly PhaseTime[];
}

// ---- waiting processes

/**
 * Asks for a set of waiting processes, made before the fork that will use it: what `ForkRequest` says of the clones'
 * command lines.
 */
export type WarmRequest = Pick<
  ForkRequest,
  'cloneCount' | 'namePrefix' | 'parentMode' | 'memory' | 'network' | 'disks'
> & {
  readonly vm: string;
};

/** One set, for one shape: a fork takes all of it or none. */
export interface WarmSetView {
  /** Of the empty image that it waits for. */
  readonly image: string;
  readonly vm: string;
  readonly cloneCount: number;
  readonly namePrefix: string | null;
  readonly memory: CloneMemory;
  readonly network: CloneNetwork;
  readonly disks: CloneDisks;
  readonly state: 'starting' | 'ready';
  /** Processes that wait by now. */
  readonly readyCount: number;
}

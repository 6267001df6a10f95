/**
 * The terms of forking as types. A fork takes an image of a VM (an immutable snapshot of memory, device state and
 * disks) and runs clones on it. Imports only its neighbours in domain/; every layer may import it.
 */
import type { DataSecurity } from './data-security.js';
import type { Fanout, FanoutChoice, FanoutPlan, MulticastProvider, TopologyFile } from './fanout.js';
import type { PhaseTime } from './progress.js';
import type { SharedStorage } from './storage.js';
import type { Transport, TransportChoice } from './transport.js';

/**
 * continue: the parent keeps running, and its pages are copied. stop: the parent stays stopped, and its memory files
 * become the image without a copy.
 */
export const PARENT_MODES = ['continue', 'stop'] as const;
export type ParentMode = (typeof PARENT_MODES)[number];

/**
 * cow: the clone maps the image copy-on-write. private: the clone has its own shared memory file, filled from the
 * image, and so is an ordinary VM.
 */
export const CLONE_MEMORIES = ['cow', 'private'] as const;
export type CloneMemory = (typeof CLONE_MEMORIES)[number];

/**
 * fresh: each NIC is replaced by one with a new MAC on the parent's bridge. isolated: each clone has its own network
 * namespace with bridges of the same names, and keeps the parent's MAC. none: the NICs exist without a connection.
 */
export const CLONE_NETWORKS = ['fresh', 'isolated', 'none'] as const;
export type CloneNetwork = (typeof CLONE_NETWORKS)[number];

/**
 * overlay: each clone has its own qcow2 overlay on the parent's disks, removed with the clone. scratch: writes are
 * dropped when the clone ends.
 */
export const CLONE_DISKS = ['overlay', 'scratch'] as const;
export type CloneDisks = (typeof CLONE_DISKS)[number];

/**
 * How a host that joins a fork gets at a disk of the image. shared: both hosts see the same files under the same paths.
 * served: the host that has the image serves them.
 */
export const DISK_ACCESSES = ['shared', 'served'] as const;
export type DiskAccess = (typeof DISK_ACCESSES)[number];

export const CLONES_MAX = 1024;

/** spread: as many clones for each processor on all hosts. pack: the first hosts are filled before the next ones. */
export const PLACEMENTS = ['spread', 'pack'] as const;
export type Placement = (typeof PLACEMENTS)[number];

/**
 * all: a host that joins a fork reads the whole image, the pages that its clones touch first. demand: it reads only
 * what its clones touch.
 */
export const IMAGE_FETCHES = ['all', 'demand'] as const;
export type ImageFetchMode = (typeof IMAGE_FETCHES)[number];

/** A host on which clones are to run. */
export interface HostWish {
  readonly host: string;
  /** Null: as many as the placement gives it. */
  readonly cloneCount: number | null;
}

/** The clones that one host makes of a fork over several hosts: `count` of them, from the index `first` on. */
export interface ForkShare {
  readonly first: number;
  readonly count: number;
}

export interface HostShare extends ForkShare {
  readonly host: string;
  /** How the host gets at each disk of the parent. Absent: the host has the parent, or there are no disks. */
  readonly disks?: readonly DiskShare[];
}

export interface DiskShare {
  readonly id: string;
  readonly access: DiskAccess;
}

export interface ForkRequest {
  /** The VM to fork. null: the clones run on `image`. */
  readonly vm: string | null;
  /** An existing image. null: the fork takes an image of `vm`. */
  readonly image: string | null;
  readonly cloneCount: number;
  /** The clones are named PREFIX-0 and so on. null: the prefix is the parent's name with the image's id. */
  readonly namePrefix: string | null;
  readonly parentMode: ParentMode;
  readonly memory: CloneMemory;
  readonly network: CloneNetwork;
  readonly disks: CloneDisks;
  /** false: all clones or none. true: some clones suffice, and the report lists those that failed. */
  readonly isPartialAllowed: boolean;
  /** Ended VMs with the clones' names are removed, with their exit codes and logs. Absent: they are not. */
  readonly isReplacing?: boolean;
  /** Absent: all clones run on the host that has the parent or the image. */
  readonly hosts?: readonly HostWish[];
  /** Absent: spread. */
  readonly placement?: Placement;
  /** Absent: all. */
  readonly fetch?: ImageFetchMode;
  /** How the other hosts read the image. Absent: auto. */
  readonly transport?: TransportChoice;
  /**
   * assume: the user says that all hosts share the parent's disks. Absent: a disk that a host is not proven to see is
   * served to it.
   */
  readonly sharedStorage?: SharedStorage;
  /** The least protection of the image on its way to them. Absent: what the hosts demand. */
  readonly dataSecurity?: DataSecurity;
  /** How the image gets to the other hosts. Absent: auto. */
  readonly fanout?: FanoutChoice;
  /** Which hosts share a switch. A plan does not keep it. Absent: nobody has said so. */
  readonly topology?: TopologyFile;
}

/** What distinguishes a clone from its parent and from the other clones. It is set when the clone's QEMU starts. */
export interface CloneIdentity {
  /** 0 .. cloneCount - 1 */
  readonly index: number;
  readonly cloneCount: number;
  readonly name: string;
  readonly uuid: string;
  readonly vmGenerationId: string;
  /** MACs of the running clone, by NIC id. */
  readonly macs: Readonly<Record<string, string>>;
}

export const FORK_STEPS = [
  'reserveParent',
  'prepareClones',
  'armParent',
  'connectHosts',
  'forkPoint',
  'loadClones',
  'commitFork',
  'runClones',
  'fillImage',
  'releaseParent',
] as const;
export type ForkStepName = (typeof FORK_STEPS)[number];

/** Steps that only journals of earlier builds have: `startClones` let the clones run before the commit. */
export const EARLIER_FORK_STEPS = ['startClones'] as const;
export type EarlierForkStepName = (typeof EARLIER_FORK_STEPS)[number];

export interface ForkStep {
  readonly name: ForkStepName;
  readonly host: string;
  /** One line for --dry-run. */
  readonly text: string;
  /** The parent is stopped during this step. */
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
  /** Which host makes which clones. The first is `host`, also if it makes none. Absent: `host` makes all of them. */
  readonly shares?: readonly HostShare[];
  /** How the other hosts read the image, and why. Absent if there are none. */
  readonly transport?: Transport;
  readonly transportReason?: string;
  /** How the image gets to them. Absent if there are none, or for a plan of an earlier build: unicast. */
  readonly fanout?: FanoutPlan;
  /** Why the waiting processes of the parent do not fit the request. Absent if there are none, or if they fit. */
  readonly coldReason?: string;
}

export interface CloneReport extends CloneIdentity {
  readonly host: string;
  /** MAC of the first NIC; null if there is no NIC. */
  readonly mac: string | null;
  /** Time from the request until the clone's QEMU has resumed. */
  readonly readyMs: number;
}

export interface CloneFailure {
  readonly index: number;
  readonly name: string;
  readonly error: unknown;
  /** Absent: the host of the parent. */
  readonly host?: string;
}

export interface ForkReport {
  readonly job: string;
  readonly image: string;
  readonly parent: string;
  /** How long the parent's vCPUs were stopped, by QEMU's STOP and RESUME events. 0 for a fork of an existing image. */
  readonly parentPauseMs: number;
  /** The clones' QEMU processes had been started before the fork. */
  readonly isWarm: boolean;
  /** Why waiting processes of the parent were not used, if there were any. */
  readonly coldReason?: string;
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
    /** Image bytes that arrived at each host; on the parent's host, the bytes copied. */
    readonly perHost: Readonly<Record<string, number>>;
    /** Image and device state that the root has sent to all hosts together; a multicast counts once. */
    readonly rootEgress: number;
    /** What the root has sent as a multicast. */
    readonly multicast: number;
    /** Pages of a multicast that hosts have lost and got from each other, or from the root. */
    readonly repair: number;
    /** Pages that came through relays. */
    readonly relayed: number;
    /** What each host has sent to the others, in bytes of pages. */
    readonly perLink: Readonly<Record<string, number>>;
  };
  /** Absent: no other host took part. */
  readonly fanout?: {
    readonly kind: Fanout;
    readonly reason: string;
    /** Of a multicast only. */
    readonly provider?: MulticastProvider;
    /** The share of the datagrams that each host has lost, from 0 to 1. Empty without a multicast. */
    readonly lossPerHost: Readonly<Record<string, number>>;
  };
  readonly faults: {
    /** Writes of the parent that waited until a page was copied. */
    readonly parent: number;
    readonly clones: number;
  };
  readonly phases: readonly PhaseTime[];
}

// ---- waiting processes

/**
 * Requests a set of waiting processes before the fork that will use it. It holds the part of `ForkRequest` that
 * determines the clones' command lines.
 */
export type WarmRequest = Pick<
  ForkRequest,
  'cloneCount' | 'namePrefix' | 'parentMode' | 'memory' | 'network' | 'disks'
> & {
  readonly vm: string;
};

/**
 * A set of waiting processes (src/agent/fork/pool.ts). A fork takes all of a set or nothing, and only if the request
 * matches: each process knows its command line, including its index and the clone count, from its start.
 */
export interface WarmSetView {
  /** Id of the empty image that the processes wait for. */
  readonly image: string;
  readonly vm: string;
  readonly cloneCount: number;
  readonly namePrefix: string | null;
  readonly memory: CloneMemory;
  readonly network: CloneNetwork;
  readonly disks: CloneDisks;
  readonly state: 'starting' | 'ready';
  /** Number of processes that are ready. */
  readonly readyCount: number;
}

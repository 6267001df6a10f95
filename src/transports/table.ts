/**
 * The transports: a row for each, and the one place that names them all. What the planner, the agent and the commands
 * need to know of a transport is a column, so that nobody asks for one by its name. Imports nothing.
 *
 * A new transport is a row here and a provider in native/transport (docs/ARCHITECTURE.md, "To add a transport").
 */
export interface TransportRow {
  /** As a person calls it. */
  readonly title: string;
  /** Its name in the native registry of providers. */
  readonly provider: string;
  /** The target's device reads the source's memory: no thread of the source has a part in a page. */
  readonly isOneSided: boolean;
  /**
   * A device gets to know the memory before anything moves. That takes time, puts a page behind every byte and locks it.
   */
  readonly registersMemory: boolean;
  /** Source and target must be on one machine. */
  readonly sameMachineOnly: boolean;
  /** Serves memory that is in no one file: of a clone, the pages that only its process has. */
  readonly readsProcessMemory: boolean;
  /** Why not, if so: "the memory of web is partly its image's and partly its own, which ...". */
  readonly processMemoryObstacle?: string;
  /** QEMU's own migration can be driven over it. */
  readonly carriesBackendMoves: boolean;
  /** For both channels, the registering of memory included. */
  readonly connectTimeoutMs: number;
  /** `auto` takes the transport with the highest rank that nothing stands in the way of; null: only on request. */
  readonly autoRank: number | null;
  /** For the help of `vmigrate`. */
  readonly help: string;
}

export const TRANSPORT_TABLE = {
  tcp: {
    title: 'TCP',
    provider: 'tcp',
    isOneSided: false,
    registersMemory: false,
    sameMachineOnly: false,
    readsProcessMemory: true,
    carriesBackendMoves: true,
    connectTimeoutMs: 3_000,
    autoRank: 0,
    help: 'over TCP (default elsewhere)',
  },
  shm: {
    title: 'shm',
    provider: 'shm',
    isOneSided: true,
    registersMemory: false,
    sameMachineOnly: true,
    readsProcessMemory: false,
    processMemoryObstacle: 'a neighbour cannot map',
    carriesBackendMoves: false,
    connectTimeoutMs: 3_000,
    autoRank: null,
    help: 'shared memory, between two daemons of one machine',
  },
  rdma: {
    title: 'RDMA',
    provider: 'verbs',
    isOneSided: true,
    registersMemory: true,
    sameMachineOnly: false,
    readsProcessMemory: false,
    processMemoryObstacle: 'no RDMA device reads',
    carriesBackendMoves: false,
    // Connection requests that are lost are sent again after some seconds only.
    connectTimeoutMs: 6_000,
    autoRank: 1,
    help: 'over RDMA (default where both hosts have a port that reaches the other)',
  },
} as const satisfies Readonly<Record<string, TransportRow>>;

/**
 * The table of transports, and the only place that names them all. What the planner, the agent and the commands need to
 * know of a transport is a column, so that no code has to ask for a transport by name. Imports nothing.
 *
 * A new transport is a row here and a provider in native/transport (docs/ARCHITECTURE.md, "To add a transport").
 */
export interface TransportRow {
  /** Name for people. */
  readonly title: string;
  /** Name in the native registry of providers. */
  readonly provider: string;
  /** The target's device reads the source's memory, without a thread of the source. */
  readonly isOneSided: boolean;
  /** A device registers the memory before anything moves. That takes time, allocates all of the memory and locks it. */
  readonly registersMemory: boolean;
  /** Source and target must be on one machine. */
  readonly sameMachineOnly: boolean;
  /** Serves memory that is not in a file, such as the pages that a clone has written and only its process holds. */
  readonly readsProcessMemory: boolean;
  /** This project sends the bytes, so that it can protect them. Else a device does, or they stay in the machine. */
  readonly protectsBytes: boolean;
  /** vmigrate can run QEMU's own migration over it. */
  readonly carriesBackendMoves: boolean;
  /** How long connecting may take, for both channels, the registering of memory included. */
  readonly connectTimeoutMs: number;
  /** `auto` chooses the possible transport with the highest rank. null: used only on request. */
  readonly autoRank: number | null;
  /** Help text for `vmigrate`. */
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
    protectsBytes: true,
    carriesBackendMoves: true,
    connectTimeoutMs: 3_000,
    autoRank: 0,
    help: 'use TCP (default elsewhere)',
  },
  shm: {
    title: 'shm',
    provider: 'shm',
    isOneSided: true,
    registersMemory: false,
    sameMachineOnly: true,
    readsProcessMemory: false,
    protectsBytes: false,
    carriesBackendMoves: false,
    connectTimeoutMs: 3_000,
    autoRank: null,
    help: 'use shared memory, between two daemons on one machine',
  },
  rdma: {
    title: 'RDMA',
    provider: 'verbs',
    isOneSided: true,
    registersMemory: true,
    sameMachineOnly: false,
    readsProcessMemory: false,
    protectsBytes: false,
    carriesBackendMoves: false,
    // Connection requests that are lost are sent again after some seconds only.
    connectTimeoutMs: 6_000,
    autoRank: 1,
    help: 'use RDMA (default if both hosts have RDMA ports that reach each other)',
  },
} as const satisfies Readonly<Record<string, TransportRow>>;

/**
 * The terms of fan-out as types: how an image gets from its root, the host that has it, to many hosts. Imports nothing;
 * every layer may import it.
 */

/**
 * unicast: each host reads every page from the root. multicast: the root sends each page once to all hosts, which get
 * what they have lost from each other. tree: a host reads from another host, its relay, and only some read from the
 * root.
 */
export const FANOUTS = ['unicast', 'multicast', 'tree'] as const;
export type Fanout = (typeof FANOUTS)[number];

/** What carries the datagrams of a multicast: UDP, or RDMA (unreliable datagrams). */
export const MULTICAST_PROVIDERS = ['udp', 'verbs'] as const;
export type MulticastProvider = (typeof MULTICAST_PROVIDERS)[number];

/** auto: the planner chooses. */
export const FANOUT_CHOICES = ['auto', ...FANOUTS] as const;
export type FanoutChoice = (typeof FANOUT_CHOICES)[number];

/** A file that says which hosts share a switch, as a user has given it. */
export interface TopologyFile {
  /** For messages. */
  readonly name: string;
  readonly text: string;
}

/**
 * The hosts that one host asks for pages before it asks the root: the nearest level first. In a tree a level is one
 * relay. After a multicast a level is some of the hosts that have received it too.
 */
export type NearLevels = readonly (readonly string[])[];

export interface NearHosts {
  readonly host: string;
  readonly levels: NearLevels;
  /** Whom it asks for the digests of pages before the root: its relays in a tree of all hosts, the nearest first. */
  readonly digestRelays: readonly string[];
}

/** How the image of a fork gets to the hosts that join it. */
export interface FanoutPlan {
  readonly kind: Fanout;
  /** Why, in a sentence. */
  readonly reason: string;
  /** The hosts that have somebody to ask before the root. */
  readonly near: readonly NearHosts[];
  /** Of a multicast only, like `datagramBytesMax`. */
  readonly provider?: MulticastProvider;
  /** The size in bytes of the largest datagram that all hosts have received from the root. */
  readonly datagramBytesMax?: number;
}

/** What a host that joins a fork is told of the plan. */
export interface HostFanout {
  readonly kind: Fanout;
  readonly levels: NearLevels;
  readonly digestRelays: readonly string[];
  readonly provider?: MulticastProvider;
  readonly datagramBytesMax?: number;
}

/** The largest datagram of a probe that a host has received; 0: none. */
export interface HeardProbe {
  readonly host: string;
  readonly largestBytes: number;
}

/** What a probe of one group has shown. */
export interface ProbedGroup {
  readonly provider: MulticastProvider;
  readonly heard: readonly HeardProbe[];
}

/** The least round trip from one host to another, of some. */
export interface RoundTrip {
  readonly host: string;
  /** In microseconds. Null: it does not answer. */
  readonly us: number | null;
}

/** A group to which the root of an image sends its pages, and the secret of its datagrams. */
export interface MulticastGroup {
  readonly provider: MulticastProvider;
  readonly group: string;
  readonly port: number;
  readonly ttl: number;
  /** 32 bytes, in hex. */
  readonly key: string;
  /** 8 bytes, in hex. */
  readonly session: string;
  /** The largest IP packet; 0: that of the interface. */
  readonly mtuBytes: number;
}

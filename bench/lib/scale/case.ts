/** One case of the model: hosts, network and what goes wrong. All hosts are indices; the root is 0. */
import type { Topology } from '../../../src/planner/fanout/topology.js';
import { Network } from './network.js';
import { randomOf } from './random.js';

/** The image travels in this many parts, all alike. */
export const CHUNKS = 256;

export interface CaseOptions {
  readonly topology: Topology;
  /** The root first. */
  readonly hosts: readonly string[];
  readonly imageBytes: number;
  /** Of a host's link, in each direction. */
  readonly linkBytesPerS: number;
  readonly oversubscription: number;
  /** The share of packets that are lost on the way to a host. */
  readonly loss: number;
  /** The share of hosts whose link is slower, and by which factor. */
  readonly stragglers: { readonly share: number; readonly factor: number };
  /** The share of hosts that die, at times spread evenly over `withinS`. */
  readonly deaths: { readonly share: number; readonly withinS: number };
  readonly degree: number;
  readonly seed: number;
}

export interface Death {
  readonly atS: number;
  readonly host: number;
}

export interface Case extends CaseOptions {
  readonly chunkBytes: number;
  readonly network: Network;
  /** How much slower each host is: 1 if it is as it should be. */
  readonly slowness: readonly number[];
  /** In the order of time. */
  readonly dying: readonly Death[];
  readonly random: () => number;
}

const HOP_S = 5e-6;

export function caseOf(options: CaseOptions): Case {
  const { topology, hosts, linkBytesPerS, oversubscription, stragglers, deaths, imageBytes } = options;
  const random = randomOf(options.seed);
  const slowness = hosts.map((_, index) => (index > 0 && random() < stragglers.share ? stragglers.factor : 1));
  const dying = hosts.flatMap((_, host): Death[] =>
    host > 0 && random() < deaths.share ? [{ host, atS: random() * deaths.withinS }] : [],
  );
  const network = new Network({
    ...{ topology, hosts, oversubscription, hopS: HOP_S },
    hostBytesPerS: (index) => linkBytesPerS / (slowness[index] ?? 1),
  });
  return {
    ...{ ...options, network, slowness, random, chunkBytes: imageBytes / CHUNKS },
    dying: dying.toSorted((a, b) => a.atS - b.atS),
  };
}

export interface Outcome {
  /** When each host had the whole image; null for those that have died, and for the root. */
  readonly fullS: readonly (number | null)[];
  readonly rootEgressBytes: number;
}

const TCP_SEGMENT_BYTES = 1448;
const ROUND_TRIP_S = 100e-6;

/** What one connection carries at most where packets are lost by chance (Mathis et al., 1997). */
export function connectionBytesPerS(loss: number): number {
  return loss === 0 ? Infinity : (TCP_SEGMENT_BYTES / ROUND_TRIP_S) * (1.22 / Math.sqrt(loss));
}

/** From a request until its answer begins. */
export const REQUEST_S = ROUND_TRIP_S;

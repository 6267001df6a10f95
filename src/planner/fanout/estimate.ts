/** How long each fan-out takes, roughly: enough to choose one. `bench -- scale` simulates what this leaves out. */
import type { Fanout } from '../../domain/fanout.js';

/** How many hosts read from one host of a tree. With fewer the tree gets deep; more share what a host can send. */
export const FANOUT_DEGREE = 2;

export interface FanoutLoad {
  /** Hosts that read the image. */
  readonly hostCount: number;
  /** What is sent of the image: its bytes that are not zero. */
  readonly imageBytes: number;
  /** Of the slowest host, in each direction. */
  readonly linkBytesPerS: number;
  readonly degree?: number;
}

/** Probing the group, and opening sockets on all hosts. */
const MULTICAST_SETUP_S = 0.25;
/** The share of a link that multicast uses: pacing stays below what receivers drain, headers and repair take some. */
const MULTICAST_SHARE = 0.85;
/** Connecting each host to its parents. */
const TREE_SETUP_S = 0.1;
/** From a page's arrival at a host until the next host has asked for it. */
const HOP_S = 0.02;

export function fanoutSeconds(kind: Fanout, load: FanoutLoad): number {
  const { hostCount, imageBytes, linkBytesPerS, degree = FANOUT_DEGREE } = load;
  const onceS = imageBytes / linkBytesPerS;
  switch (kind) {
    case 'unicast':
      return hostCount * onceS;
    case 'multicast':
      return MULTICAST_SETUP_S + onceS / MULTICAST_SHARE;
    default:
      return TREE_SETUP_S + Math.min(hostCount, degree) * onceS + levels(hostCount, degree) * HOP_S;
  }
}

/** How many hosts are above each other in a tree that is as flat as its degree allows. */
function levels(hostCount: number, degree: number): number {
  if (degree <= 1) return hostCount;
  let level = 0;
  for (let reached = 0, width = degree; reached < hostCount; width *= degree) {
    reached += width;
    level++;
  }
  return level;
}

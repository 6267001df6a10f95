/** Guesses racks from round trips between hosts, where no file says how they are connected. */
import type { Topology, TopologyHost, TopologySwitch } from './topology.js';

export interface RoundTrips {
  readonly hosts: readonly string[];
  /** `us[from][to]` in microseconds: the least of some round trips. Null: not measured. The diagonal is not read. */
  readonly us: readonly (readonly (number | null)[])[];
}

/** A round trip of this many times the one before it leaves the rack. */
export const GAP_FACTOR = 1.8;
/** Added to both sides of a comparison: below it, round trips differ by chance. */
export const NOISE_US = 10;
const LEVELS_MAX = 3;

/**
 * The rule: two hosts are in one rack if a chain of hosts connects them whose round trips are all below the gap. The
 * gap is where the round trips that connect the hosts with the least sum (their minimum spanning tree), in order,
 * grow by the largest factor. It counts if that factor is GAP_FACTOR or more, and if at least half of these round trips
 * are below it: so one pair of very near hosts does not split all the others. Within what it separates the same rule
 * applies again (racks of a site), LEVELS_MAX levels deep. Without a gap all hosts are in one rack.
 *
 * Of the two directions the smaller round trip counts, because a busy host can only make it longer. A host that was
 * never reached is in a rack of its own. Takes a time that grows with the size of the matrix.
 */
export function topologyFromRoundTrips({ hosts, us }: RoundTrips): Topology {
  const edges = spanningTree(hosts.length, (from, to) => Math.min(usAt(us, from, to), usAt(us, to, from)));
  const switches: TopologySwitch[] = [];
  const leaves = new Map<number, number>();
  const split = (members: readonly number[], parent: number | null, level: number): void => {
    const own = new Set(members);
    const within = edges.filter(({ from, to }) => own.has(from) && own.has(to));
    const gap = level < LEVELS_MAX ? gapOf(within.map((edge) => edge.us)) : null;
    const index = switches.length;
    switches.push({ name: gap === null ? `rack-${index}` : `network-${index}`, parent, linkSpeed: null });
    if (gap === null) {
      for (const member of members) leaves.set(member, index);
      return;
    }
    const near = within.filter((edge) => edge.us < gap);
    for (const group of components(members, near)) split(group, index, level + 1);
  };
  if (hosts.length > 0) split([...hosts.keys()], null, 0);
  return {
    ...{ origin: 'measured round trips', switches, linkSpeedUnit: 'arbitrary' },
    hosts: new Map(
      hosts.map((host, index): [string, TopologyHost] => [host, { leaf: leaves.get(index) ?? 0, linkSpeed: null }]),
    ),
  };
}

interface Edge {
  readonly from: number;
  readonly to: number;
  readonly us: number;
}

function usAt(us: RoundTrips['us'], from: number, to: number): number {
  const value = us[from]?.[to] ?? null;
  return value !== null && value >= 0 ? value : Infinity;
}

/** Prim's algorithm. Of equal distances the first host counts. */
function spanningTree(count: number, distance: (from: number, to: number) => number): Edge[] {
  const edges: Edge[] = [];
  const nearest = Array.from({ length: count }, () => ({ from: 0, us: Infinity }));
  const isIn = Array.from({ length: count }, () => false);
  let last = 0;
  for (let added = 1; added < count; added++) {
    isIn[last] = true;
    let next = -1;
    for (let to = 0; to < count; to++) {
      const known = nearest[to];
      if (isIn[to] === true || known === undefined) continue;
      const us = distance(last, to);
      if (us < known.us) nearest[to] = { from: last, us };
      if (next < 0 || (nearest[to]?.us ?? Infinity) < (nearest[next]?.us ?? Infinity)) next = to;
    }
    edges.push({ from: nearest[next]?.from ?? 0, to: next, us: nearest[next]?.us ?? Infinity });
    last = next;
  }
  return edges;
}

/** Returns the first round trip above the gap, or null if there is none. */
function gapOf(unordered: readonly number[]): number | null {
  const ordered = unordered.toSorted((a, b) => a - b);
  let best: { us: number; factor: number } | null = null;
  for (let above = Math.max(1, Math.ceil(ordered.length / 2)); above < ordered.length; above++) {
    const us = ordered[above] ?? 0;
    const factor = (us + NOISE_US) / ((ordered[above - 1] ?? 0) + NOISE_US);
    if (factor >= GAP_FACTOR && (best === null || factor > best.factor)) best = { us, factor };
  }
  return best?.us ?? null;
}

/** Returns what the edges connect, in the order of the first members. */
function components(members: readonly number[], edges: readonly Edge[]): number[][] {
  const leader = new Map(members.map((member) => [member, member]));
  const find = (member: number): number => {
    let top = member;
    for (let up = leader.get(top); up !== undefined && up !== top; up = leader.get(top)) top = up;
    for (let at = member; at !== top; ) {
      const up = leader.get(at) ?? top;
      leader.set(at, top);
      at = up;
    }
    return top;
  };
  for (const { from, to } of edges) leader.set(find(to), find(from));
  const groups = new Map<number, number[]>();
  for (const member of members) {
    const top = find(member);
    const group = groups.get(top);
    if (group === undefined) groups.set(top, [member]);
    else group.push(member);
  }
  return [...groups.values()];
}

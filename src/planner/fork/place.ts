/** Decides which host of a fork makes which clones. Pure. */
import type { HostShare, HostWish, Placement } from '../../domain/fork.js';

/** What is known of a host for the placement. */
export interface HostRoom {
  readonly host: string;
  /** How many clones fit there, by memory, budgets and limits. 0: none may run there. */
  readonly count: number;
  /** Its processors. Null: not known. */
  readonly cpuCount: number | null;
}

export interface PlacementQuestion {
  readonly cloneCount: number;
  readonly placement: Placement;
  readonly wishes: readonly HostWish[];
  /** One for each wish, in their order. */
  readonly rooms: readonly HostRoom[];
  /** A host that has no room for the number given to it makes fewer. */
  readonly isPartialAllowed: boolean;
}

/**
 * Returns how many clones each wish gets, in their order: the given numbers first, the rest by the placement. The sum
 * is less than `cloneCount` if the hosts have no more room.
 */
export function placeClones(question: PlacementQuestion): number[] {
  const { cloneCount, placement, wishes, rooms, isPartialAllowed } = question;
  const roomOf = (index: number): number => Math.max(0, rooms[index]?.count ?? 0);
  const counts = wishes.map(({ cloneCount: given }, index) => {
    if (given === null) return 0;
    return isPartialAllowed ? Math.min(given, roomOf(index)) : given;
  });
  const open = [...wishes.keys()].filter((index) => wishes[index]?.cloneCount === null);
  const given = wishes.reduce((sum, wish) => sum + (wish.cloneCount ?? 0), 0);
  let left = Math.max(0, cloneCount - given);
  if (placement === 'pack') {
    for (const index of open) {
      counts[index] = Math.min(left, roomOf(index));
      left -= counts[index];
    }
    return counts;
  }
  // A clone goes where the fewest clones share a processor. Without all numbers of processors all hosts are equal.
  const areCpusKnown = open.every((index) => (rooms[index]?.cpuCount ?? 0) > 0);
  const cpusOf = (index: number): number => (areCpusKnown ? (rooms[index]?.cpuCount ?? 1) : 1);
  for (; left > 0; left--) {
    let best: number | null = null;
    const loadOf = (index: number): number => ((counts[index] ?? 0) + 1) / cpusOf(index);
    for (const index of open) {
      if ((counts[index] ?? 0) < roomOf(index) && (best === null || loadOf(index) < loadOf(best))) best = index;
    }
    if (best === null) break;
    counts[best] = (counts[best] ?? 0) + 1;
  }
  return counts;
}

/**
 * Numbers the clones through, in the order of the wishes. The root (the host of the parent or image) comes first in the
 * result, also without clones, because it takes part in any case. Another host without clones is left out, unless its
 * user has given it none: then it only gets the image.
 */
export function sharesOf(root: string, wishes: readonly HostWish[], counts: readonly number[]): HostShare[] {
  const shares: HostShare[] = [];
  let first = 0;
  for (const [index, { host, cloneCount }] of wishes.entries()) {
    const count = counts[index] ?? 0;
    if (count > 0 || cloneCount === 0 || host === root) shares.push({ host, first, count });
    first += count;
  }
  const own = shares.find(({ host }) => host === root) ?? { host: root, first: 0, count: 0 };
  return [own, ...shares.filter((share) => share !== own)];
}

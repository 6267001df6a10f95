/** Decides from which hosts a host reads what a multicast has not brought. Pure. */
import { racksOf, scopesOf } from './scopes.js';
import type { Topology } from './topology.js';

/** Each connection costs both ends a thread's attention, and four hosts rarely lack the same page. */
export const SIBLINGS_PER_LEVEL = 4;

export interface SiblingQuestion {
  readonly topology: Topology | null;
  /** All hosts that read the image. The root is not among them: it is the last resort anyway. */
  readonly hosts: readonly string[];
}

/** Near holders of a host by level, nearest first, without empty levels. */
export type SiblingLevels = readonly (readonly string[])[];

/**
 * Returns who reads from whom: first from hosts of the same rack, then from others. In a rack a host reads from those
 * that come after it, in a circle, so that each serves as many as it reads from. Of the other racks, neighbours read
 * from neighbours, at SIBLINGS_PER_LEVEL places spread over all of them.
 */
export function siblings({ topology, hosts }: SiblingQuestion): (host: string) => SiblingLevels {
  const order: string[] = [];
  const places = new Map<string, { readonly at: number; readonly from: number; readonly to: number }>();
  for (const { hosts: rack } of racksOf(scopesOf(topology, hosts))) {
    const from = order.length;
    for (const host of rack) {
      places.set(host, { at: order.length, from, to: from + rack.length });
      order.push(host);
    }
  }
  return (host) => {
    const place = places.get(host);
    if (place === undefined) return [];
    const { at, from, to } = place;
    const inRack = to - from;
    const elsewhere = order.length - inRack;
    const near = numbers(Math.min(SIBLINGS_PER_LEVEL, inRack - 1)).map((n) => from + ((at - from + 1 + n) % inRack));
    const count = Math.min(SIBLINGS_PER_LEVEL, elsewhere);
    const far = numbers(count).map((n) => {
      const step = at - from + Math.floor((n * elsewhere) / count);
      return (to + (step % elsewhere)) % order.length;
    });
    const levels = [near, far].map((level) => level.flatMap((index) => order[index] ?? []));
    return levels.filter((level) => level.length > 0);
  };
}

/** For one host. Use `siblings` for many: it looks at the topology once. */
export function siblingLevels({ host, ...question }: SiblingQuestion & { readonly host: string }): SiblingLevels {
  return siblings(question)(host);
}

function numbers(count: number): number[] {
  return Array.from({ length: Math.max(0, count) }, (_, index) => index);
}

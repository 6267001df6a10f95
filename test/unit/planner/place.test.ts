import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { HostWish, Placement } from '../../../src/domain/fork.js';
import { type HostRoom, type PlacementQuestion, placeClones, sharesOf } from '../../../src/planner/fork/place.js';

interface HostCase {
  readonly given: number | null;
  readonly room: number;
  readonly cpuCount: number | null;
}

const nameOf = (index: number): string => `h${index}`;
const sum = (counts: readonly number[]): number => counts.reduce((total, count) => total + count, 0);

function question(
  cloneCount: number,
  placement: Placement,
  hosts: readonly HostCase[],
  isPartialAllowed = false,
): PlacementQuestion {
  return {
    ...{ cloneCount, placement, isPartialAllowed },
    wishes: hosts.map(({ given }, index): HostWish => ({ host: nameOf(index), cloneCount: given })),
    rooms: hosts.map(({ room, cpuCount }, index): HostRoom => ({ host: nameOf(index), count: room, cpuCount })),
  };
}

const anyHost = fc.record({
  given: fc.option(fc.nat(20)),
  room: fc.nat(40),
  cpuCount: fc.option(fc.integer({ min: 0, max: 64 })),
});
const openHost = fc.record({
  given: fc.constant(null),
  room: fc.nat(40),
  cpuCount: fc.option(fc.integer({ min: 1, max: 64 })),
});
const anyPlacement = fc.constantFrom<Placement>('spread', 'pack');
/** At least as many clones as are given to hosts. */
const anyQuestion = fc
  .tuple(fc.array(anyHost, { minLength: 1, maxLength: 8 }), fc.nat(100), anyPlacement, fc.boolean())
  .map(([hosts, more, placement, isPartial]) =>
    question(sum(hosts.map(({ given }) => given ?? 0)) + more, placement, hosts, isPartial),
  );

describe('the placement of clones', () => {
  test('places as many as are wanted, or fills every host that may take more', () => {
    fc.assert(
      fc.property(anyQuestion, (asked) => {
        const counts = placeClones(asked);
        const { cloneCount, wishes, rooms, isPartialAllowed } = asked;
        expect(counts).toHaveLength(wishes.length);
        expect(sum(counts)).toBeLessThanOrEqual(cloneCount);
        const isFull = wishes.every(
          (wish, index) => wish.cloneCount !== null || counts[index] === Math.max(0, rooms[index]!.count),
        );
        const isShort = wishes.some((wish, index) => (wish.cloneCount ?? 0) > (counts[index] ?? 0));
        expect(sum(counts) === cloneCount || isFull || (isPartialAllowed && isShort)).toBe(true);
      }),
    );
  });

  test('gives a host the number that its user has given it, with --partial at most what has room there', () => {
    fc.assert(
      fc.property(anyQuestion, (asked) => {
        const counts = placeClones(asked);
        for (const [index, { cloneCount }] of asked.wishes.entries()) {
          if (cloneCount === null) continue;
          const wanted = asked.isPartialAllowed ? Math.min(cloneCount, asked.rooms[index]!.count) : cloneCount;
          expect(counts[index]).toBe(wanted);
        }
      }),
    );
  });

  test('never exceeds the room of a host without a given number', () => {
    fc.assert(
      fc.property(anyQuestion, (asked) => {
        for (const [index, count] of placeClones(asked).entries()) {
          if (asked.wishes[index]?.cloneCount === null) expect(count).toBeLessThanOrEqual(asked.rooms[index]!.count);
        }
      }),
    );
  });
});

describe('spread', () => {
  test('differs by at most one between equal hosts with room', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 10 }),
        fc.nat(60),
        fc.option(fc.integer({ min: 1, max: 64 })),
        (n, clones, cpuCount) => {
          const hosts = Array.from({ length: n }, () => ({ given: null, room: 100, cpuCount }));
          const counts = placeClones(question(clones, 'spread', hosts));
          expect(Math.max(...counts) - Math.min(...counts)).toBeLessThanOrEqual(1);
          // The first hosts get the rest.
          expect([...counts].sort((one, other) => other - one)).toEqual(counts);
        },
      ),
    );
  });

  test('no clone would share its processor with fewer others elsewhere', () => {
    const hosts = fc.array(
      fc.record({ given: fc.constant(null), room: fc.nat(40), cpuCount: fc.integer({ min: 1, max: 64 }) }),
      { minLength: 1, maxLength: 8 },
    );
    fc.assert(
      fc.property(hosts, fc.nat(100), (open, clones) => {
        const counts = placeClones(question(clones, 'spread', open));
        const load = (index: number, more: number): number => ((counts[index] ?? 0) + more) / open[index]!.cpuCount;
        for (const [index, count] of counts.entries()) {
          for (const [other, { room }] of open.entries()) {
            if (count > 0 && (counts[other] ?? 0) < room) {
              expect(load(index, 0)).toBeLessThanOrEqual(load(other, 1));
            }
          }
        }
      }),
    );
  });

  test('gives hosts with more processors more clones', () => {
    const hosts = [8, 4, 4].map((cpuCount) => ({ given: null, room: 100, cpuCount }));
    expect(placeClones(question(16, 'spread', hosts))).toEqual([8, 4, 4]);
  });

  test('counts all hosts as equal if one does not say how many processors it has', () => {
    const hosts = [8, null, 4].map((cpuCount) => ({ given: null, room: 100, cpuCount }));
    expect(placeClones(question(9, 'spread', hosts))).toEqual([3, 3, 3]);
  });

  test('gives what does not fit on one host to the others', () => {
    const hosts = [2, 100, 100].map((room) => ({ given: null, room, cpuCount: null }));
    expect(placeClones(question(12, 'spread', hosts))).toEqual([2, 5, 5]);
  });
});

describe('pack', () => {
  test('fills a host before it takes the next one', () => {
    fc.assert(
      fc.property(fc.array(openHost, { minLength: 1, maxLength: 8 }), fc.nat(100), (hosts, clones) => {
        const counts = placeClones(question(clones, 'pack', hosts));
        const last = counts.findLastIndex((count) => count > 0);
        for (const [index, { room }] of hosts.slice(0, Math.max(0, last)).entries()) expect(counts[index]).toBe(room);
      }),
    );
  });

  test('leaves out what a host has been given', () => {
    const hosts = [null, 3, null].map((given) => ({ given, room: 5, cpuCount: 1 }));
    expect(placeClones(question(10, 'pack', hosts))).toEqual([5, 3, 2]);
  });
});

describe('the shares', () => {
  const anyShares = fc
    .tuple(fc.array(fc.record({ given: fc.option(fc.nat(3)), count: fc.nat(9) }), { maxLength: 8 }), fc.nat(9))
    .map(([hosts, root]) => ({
      root: nameOf(root),
      wishes: hosts.map(({ given }, index): HostWish => ({ host: nameOf(index), cloneCount: given })),
      counts: hosts.map(({ count }) => count),
    }));

  test('number every clone once, in the order of the wishes', () => {
    fc.assert(
      fc.property(anyShares, ({ root, wishes, counts }) => {
        const shares = sharesOf(root, wishes, counts);
        const byHost = new Map(shares.map((share) => [share.host, share]));
        const numbers = wishes.flatMap(({ host }) => {
          const { first = 0, count = 0 } = byHost.get(host) ?? {};
          return Array.from({ length: count }, (_, position) => first + position);
        });
        expect(numbers).toEqual([...Array(sum(counts)).keys()]);
        for (const [index, { host }] of wishes.entries()) expect(byHost.get(host)?.count ?? 0).toBe(counts[index]);
      }),
    );
  });

  test('begin with the root, which takes part in any case', () => {
    fc.assert(
      fc.property(anyShares, ({ root, wishes, counts }) => {
        const shares = sharesOf(root, wishes, counts);
        expect(shares[0]?.host).toBe(root);
        expect(new Set(shares.map(({ host }) => host)).size).toBe(shares.length);
      }),
    );
  });

  test('have another host without clones only if its user has given it none', () => {
    const wishes = [
      { host: 'B', cloneCount: 0 },
      { host: 'C', cloneCount: null },
      { host: 'D', cloneCount: 2 },
    ];
    expect(sharesOf('A', wishes, [0, 0, 2])).toEqual([
      { host: 'A', first: 0, count: 0 },
      { host: 'B', first: 0, count: 0 },
      { host: 'D', first: 0, count: 2 },
    ]);
  });
});

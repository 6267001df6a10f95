import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { topologyFromRoundTrips } from '../../../../src/planner/fanout/round-trips.js';
import { type Shape, switchesAbove, topologyOf } from './topologies.js';

/** Round trips in a network: those within a switch take `usOf` of its height, and some more by chance. */
function measured(shape: Shape, usOf: (height: number) => number, noise: (pair: number) => number) {
  const topology = topologyOf(shape);
  const hosts = [...topology.hosts.keys()];
  const height = (from: string, to: string): number => {
    const above = switchesAbove(topology, to);
    return switchesAbove(topology, from).findIndex((index) => above.includes(index));
  };
  const us = hosts.map((from, row) =>
    hosts.map((to, column) => usOf(height(from, to)) * (1 + noise(row * hosts.length + column))),
  );
  return { topology, hosts, us };
}

/** The racks as lists of hosts, in the order of their first hosts. */
function racksOf({ hosts }: ReturnType<typeof topologyFromRoundTrips>): string[][] {
  const racks = new Map<number, string[]>();
  for (const [host, { leaf }] of hosts) racks.set(leaf, [...(racks.get(leaf) ?? []), host]);
  return [...racks.values()];
}

const noises = fc.array(fc.double({ min: 0, max: 0.3, noNaN: true }), { minLength: 1, maxLength: 50 });
const noiseOf = (values: readonly number[]) => (pair: number) => values[pair % values.length] ?? 0;

describe('racks from measured round trips', () => {
  test('are those of the network, whatever chance adds', () => {
    const sizes = fc.array(fc.integer({ min: 2, max: 9 }), { minLength: 1, maxLength: 8 });
    fc.assert(
      fc.property(sizes, noises, (shape, values) => {
        const { topology, hosts, us } = measured(shape, (height) => [60, 180][height] ?? 0, noiseOf(values));
        expect(racksOf(topologyFromRoundTrips({ hosts, us }))).toEqual(racksOf(topology));
      }),
    );
  });

  test('are found within sites too', () => {
    const shape = [
      [3, 4, 2],
      [5, 3],
    ];
    const { topology, hosts, us } = measured(shape, (height) => [50, 150, 4000][height] ?? 0, noiseOf([0, 0.2, 0.1]));
    const guessed = topologyFromRoundTrips({ hosts, us });
    expect(racksOf(guessed)).toEqual(racksOf(topology));
    const siteOf = (host: string) => guessed.switches[switchesAbove(guessed, host)[1] ?? 0]?.name;
    expect(siteOf('h0')).toBe(siteOf('h8'));
    expect(siteOf('h0')).not.toBe(siteOf('h9'));
  });

  test('are one rack where there is no clear gap', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 20 }), noises, (count, values) => {
        const { hosts, us } = measured(count, () => 100, noiseOf(values));
        expect(racksOf(topologyFromRoundTrips({ hosts, us }))).toHaveLength(1);
      }),
    );
  });

  test('do not follow from differences of a few microseconds, or from one pair that is very near', () => {
    const few = measured(
      [2, 2, 2],
      (height) => [3, 9][height] ?? 0,
      () => 0,
    );
    expect(racksOf(topologyFromRoundTrips(few))).toHaveLength(1);
    const pair = measured(
      [2, 1, 1, 1, 1],
      (height) => [20, 200][height] ?? 0,
      () => 0,
    );
    expect(racksOf(topologyFromRoundTrips(pair))).toHaveLength(1);
  });

  test('take the smaller of both directions, and leave a host alone that was not reached', () => {
    const { hosts, us } = measured(
      [2, 2],
      (height) => [50, 200][height] ?? 0,
      () => 0,
    );
    us[0]![1] = 5000;
    us[2]![3] = 5000;
    expect(racksOf(topologyFromRoundTrips({ hosts, us }))).toEqual([
      ['h0', 'h1'],
      ['h2', 'h3'],
    ]);
    const silent = us.map((row, from) => row.map((value, to) => (from === 3 || to === 3 ? null : value)));
    expect(racksOf(topologyFromRoundTrips({ hosts, us: silent }))).toEqual([['h0', 'h1'], ['h2'], ['h3']]);
  });

  test('of no host are none', () => {
    expect(topologyFromRoundTrips({ hosts: [], us: [] }).switches).toEqual([]);
  });
});

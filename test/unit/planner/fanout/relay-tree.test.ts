import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { PARENTS_MAX, relayTree } from '../../../../src/planner/fanout/relay-tree.js';
import type { Topology } from '../../../../src/planner/fanout/topology.js';
import { anyHosts, racks, switchesAbove, topologyOf } from './topologies.js';

const anyDegree = fc.integer({ min: 1, max: 5 });

/** The hosts from the parent of `host` up to the root. Throws if it is never reached. */
function wayToRoot(parents: ReadonlyMap<string, string>, host: string, root: string): string[] {
  const way: string[] = [];
  for (let at = host; at !== root; ) {
    const parent = parents.get(at);
    if (parent === undefined || way.length > parents.size) throw new Error(`${host} does not reach ${root}`);
    way.push(parent);
    at = parent;
  }
  return way;
}

function childCounts(parents: ReadonlyMap<string, string>): number[] {
  const counts = new Map<string, number>();
  for (const parent of parents.values()) counts.set(parent, (counts.get(parent) ?? 0) + 1);
  return [...counts.values()];
}

/** How often the image enters each switch from above. */
function entries(topology: Topology, parents: ReadonlyMap<string, string>): Map<number, number> {
  const counts = new Map<number, number>();
  for (const [host, parent] of parents) {
    const ofParent = new Set(switchesAbove(topology, parent));
    for (const index of switchesAbove(topology, host)) {
      if (!ofParent.has(index)) counts.set(index, (counts.get(index) ?? 0) + 1);
    }
  }
  return counts;
}

describe('a tree of relays', () => {
  test('leads each host to the root, without a circle', () => {
    fc.assert(
      fc.property(anyHosts, anyDegree, ({ topology, root, hosts }, degree) => {
        const { parents, depth } = relayTree({ topology, root, hosts, degree });
        expect(new Set(parents.keys())).toEqual(new Set(hosts));
        const ways = hosts.map((host) => wayToRoot(parents, host, root).length);
        expect(depth).toBe(Math.max(0, ...ways));
      }),
    );
  });

  test('has at most `degree` hosts read from one host', () => {
    fc.assert(
      fc.property(anyHosts, anyDegree, (asked, degree) => {
        const { parents } = relayTree({ ...asked, degree });
        expect(Math.max(0, ...childCounts(parents))).toBeLessThanOrEqual(degree);
      }),
    );
  });

  test('brings the image into each switch once, and never into one that has the root below it', () => {
    fc.assert(
      fc.property(anyHosts, anyDegree, ({ topology, root, hosts }, degree) => {
        const counts = entries(topology, relayTree({ topology, root, hosts, degree }).parents);
        const ofRoot = new Set(switchesAbove(topology, root));
        const entered = new Set(hosts.flatMap((host) => switchesAbove(topology, host)));
        for (const index of entered) expect(counts.get(index) ?? 0).toBe(ofRoot.has(index) ? 0 : 1);
      }),
    );
  });

  test('does not depend on the order of the hosts', () => {
    fc.assert(
      fc.property(anyHosts, anyDegree, ({ topology, root, hosts }, degree) => {
        const one = relayTree({ topology, root, hosts, degree });
        const other = relayTree({ topology, root, hosts: hosts.toReversed(), degree });
        expect([...other.parents]).toEqual([...one.parents]);
      }),
    );
  });

  test('gives each host its nearest parents, without the root', () => {
    fc.assert(
      fc.property(anyHosts, anyDegree, ({ topology, root, hosts }, degree) => {
        const { parents, chains } = relayTree({ topology, root, hosts, degree });
        expect([...chains.keys()].toSorted()).toEqual(hosts.toSorted());
        for (const [host, chain] of chains) {
          expect(chain).toEqual(wayToRoot(parents, host, root).slice(0, -1).slice(0, PARENTS_MAX));
        }
      }),
    );
  });

  test('is two stages deep if the root can serve a relay of each rack: relays, then the other hosts', () => {
    const topology = racks(4, 8);
    const hosts = [...topology.hosts.keys()].slice(1);
    const { parents, depth } = relayTree({ topology, root: 'h0', hosts, degree: 16 });
    expect(depth).toBe(2);
    for (const relay of ['h8', 'h16', 'h24']) expect(parents.get(relay)).toBe('h0');
    expect(parents.get('h9')).toBe('h8');
  });

  test('has the host of a rack with the fastest link read from outside', () => {
    const topology = topologyOf([2, 3], (index) => (index === 3 ? 9 : 1));
    expect(relayTree({ topology, root: 'h0', hosts: ['h1', 'h2', 'h3', 'h4'], degree: 2 }).parents).toEqual(
      new Map([
        ['h3', 'h0'],
        ['h1', 'h0'],
        ['h2', 'h3'],
        ['h4', 'h3'],
      ]),
    );
  });

  test('of hosts without a topology is as flat as the degree allows', () => {
    const hosts = Array.from({ length: 14 }, (_, index) => `n${index}`);
    const { depth, parents } = relayTree({ topology: null, root: 'r', hosts, degree: 2 });
    expect(depth).toBe(3);
    expect(new Set(parents.keys())).toEqual(new Set(hosts));
  });

  test('takes hosts that the topology does not name, and the root as one of them, as a rack of their own', () => {
    const topology = racks(2, 2);
    const { parents } = relayTree({ topology, root: 'r', hosts: ['h0', 'h1', 'h2', 'h3', 'x'], degree: 3 });
    expect(parents.get('x')).toBe('r');
    expect(parents.get('h0')).toBe('r');
    // Both racks are below one switch, which the image enters once.
    expect(parents.get('h2')).toBe('h0');
  });

  test('of ten thousand hosts in 320 racks is not much deeper than one without racks', () => {
    const topology = topologyOf(Array.from({ length: 10 }, () => Array.from({ length: 32 }, () => 32)));
    const hosts = [...topology.hosts.keys()].slice(1);
    const { depth, parents } = relayTree({ topology, root: 'h0', hosts, degree: 2 });
    expect(parents.size).toBe(10_239);
    // 2^14 - 2 hosts fit below a root in 13 levels.
    expect(depth).toBeLessThanOrEqual(18);
  });

  test('of a line of switches and of one rack with very many hosts is made in one pass', () => {
    const hosts = Array.from({ length: 60_000 }, (_, index) => `n${index}`);
    expect(relayTree({ topology: null, root: 'r', hosts, degree: 1 }).depth).toBe(60_000);
    let deep: Parameters<typeof topologyOf>[0] = 500;
    for (let level = 0; level < 19; level++) deep = [500, deep];
    const topology = topologyOf(deep);
    const all = [...topology.hosts.keys()].slice(1);
    expect(relayTree({ topology, root: 'h0', hosts: all, degree: 2 }).parents.size).toBe(9_999);
  });
});

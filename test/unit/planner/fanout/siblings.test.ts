import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { SIBLINGS_PER_LEVEL, siblingLevels, siblings } from '../../../../src/planner/fanout/siblings.js';
import { anyHosts, racks, switchesAbove, topologyOf } from './topologies.js';

/** How many hosts read from each one. */
function loads(hosts: readonly string[], levelsOf: (host: string) => readonly (readonly string[])[]): number[] {
  const counts = new Map(hosts.map((host) => [host, 0]));
  for (const host of hosts) {
    for (const sibling of levelsOf(host).flat()) counts.set(sibling, (counts.get(sibling) ?? 0) + 1);
  }
  return [...counts.values()];
}

describe('the siblings of a host', () => {
  test('are other hosts, each once: those of its rack first, then those of other racks', () => {
    fc.assert(
      fc.property(anyHosts, ({ topology, root, hosts }) => {
        const all = [root, ...hosts];
        const levelsOf = siblings({ topology, hosts: all });
        const rackOf = (host: string) => switchesAbove(topology, host)[0];
        for (const host of all) {
          const levels = levelsOf(host);
          const found = levels.flat();
          expect(new Set(found).size).toBe(found.length);
          expect(found).not.toContain(host);
          expect(levels.every((level) => level.length > 0 && level.length <= SIBLINGS_PER_LEVEL)).toBe(true);
          const inRack = all.filter((other) => other !== host && rackOf(other) === rackOf(host)).length;
          const near = levels.flat().filter((other) => rackOf(other) === rackOf(host));
          expect(near).toHaveLength(Math.min(inRack, SIBLINGS_PER_LEVEL));
          expect(found.slice(0, near.length)).toEqual(near);
          const elsewhere = all.length - 1 - inRack;
          expect(found.length - near.length).toBe(Math.min(elsewhere, SIBLINGS_PER_LEVEL));
        }
      }),
    );
  });

  test('do not depend on the order of the hosts, or on how they are asked for', () => {
    fc.assert(
      fc.property(anyHosts, ({ topology, root, hosts }) => {
        const levelsOf = siblings({ topology, hosts: [root, ...hosts] });
        for (const host of hosts) {
          expect(siblingLevels({ topology, hosts: [...hosts.toReversed(), root], host })).toEqual(levelsOf(host));
        }
      }),
    );
  });

  test('of equal racks spread the reads evenly: each host serves as many as it reads from', () => {
    for (const topology of [racks(20, 8), racks(320, 32), racks(1, 9), racks(9, 1)]) {
      const hosts = [...topology.hosts.keys()];
      const levelsOf = siblings({ topology, hosts });
      expect(new Set(loads(hosts, levelsOf))).toEqual(new Set([levelsOf(hosts[0]!).flat().length]));
    }
  });

  test('of racks that differ spread them well enough', () => {
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 3, maxLength: 40 }), (sizes) => {
        const topology = topologyOf(sizes);
        const hosts = [...topology.hosts.keys()];
        const largest = Math.max(...sizes);
        // A rack that has most of the hosts reads from the few others more often than these read from it.
        const share = Math.ceil(largest / (hosts.length - largest));
        const bound = SIBLINGS_PER_LEVEL * (1 + share + Math.log2(hosts.length));
        expect(Math.max(...loads(hosts, siblings({ topology, hosts })))).toBeLessThanOrEqual(bound);
      }),
    );
  });

  test('of a host that does not take part, or is alone, are none', () => {
    expect(siblingLevels({ topology: null, hosts: ['a', 'b'], host: 'c' })).toEqual([]);
    expect(siblingLevels({ topology: null, hosts: ['a'], host: 'a' })).toEqual([]);
    expect(siblingLevels({ topology: null, hosts: ['a', 'b', 'c'], host: 'b' })).toEqual([['c', 'a']]);
  });
});

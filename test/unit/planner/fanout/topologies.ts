/** Topologies for tests: written as nested lists, or made by fast-check. */
import * as fc from 'fast-check';
import type { Topology, TopologyHost, TopologySwitch } from '../../../../src/planner/fanout/topology.js';

/** A number is a rack with that many hosts, a list is a switch with these below it. */
export type Shape = number | readonly Shape[];

/** Hosts are h0, h1 and so on, in order. */
export function topologyOf(shape: Shape, speedOf: (index: number) => number | null = () => null): Topology {
  const switches: TopologySwitch[] = [];
  const hosts = new Map<string, TopologyHost>();
  const add = (part: Shape, parent: number | null): void => {
    const index = switches.length;
    switches.push({ name: `s${index}`, parent, linkSpeed: speedOf(index) });
    if (typeof part !== 'number') for (const below of part) add(below, index);
    else for (let n = 0; n < part; n++) hosts.set(`h${hosts.size}`, { leaf: index, linkSpeed: speedOf(hosts.size) });
  };
  add(shape, null);
  return { origin: 'test', switches, hosts, linkSpeedUnit: 'arbitrary' };
}

export function racks(count: number, hostsEach: number): Topology {
  return topologyOf(Array.from({ length: count }, () => hostsEach));
}

/** Up to four levels of switches. */
const anyShape: fc.Arbitrary<Shape> = fc.letrec<{ shape: Shape }>((tie) => ({
  shape: fc.oneof(
    { maxDepth: 3, withCrossShrink: true },
    fc.integer({ min: 1, max: 9 }),
    fc.array(tie('shape'), { minLength: 1, maxLength: 5 }),
  ),
})).shape;

export const anyTopology: fc.Arbitrary<Topology> = fc
  .tuple(anyShape, fc.array(fc.option(fc.integer({ min: 1, max: 3 })), { minLength: 1, maxLength: 7 }))
  .map(([shape, speeds]) => topologyOf(shape, (index) => speeds[index % speeds.length] ?? null));

/** A topology and some of its hosts, the first of which is the root. */
export const anyHosts: fc.Arbitrary<{ topology: Topology; root: string; hosts: string[] }> = anyTopology.chain(
  (topology) => {
    const all = [...topology.hosts.keys()];
    return fc.shuffledSubarray(all, { minLength: 1 }).map(([root = 'h0', ...hosts]) => ({ topology, root, hosts }));
  },
);

/** The switches above a host, nearest first. */
export function switchesAbove(topology: Topology, host: string): number[] {
  const above: number[] = [];
  let next: number | null = topology.hosts.get(host)?.leaf ?? null;
  while (next !== null) {
    above.push(next);
    next = topology.switches[next]?.parent ?? null;
  }
  return above;
}

/** Runs one case of the model with each kind of fan-out. It decides by the planner's own code. */
import type { Fanout } from '../../../src/domain/fanout.js';
import { FANOUT_DEGREE } from '../../../src/planner/fanout/estimate.js';
import { relayTree } from '../../../src/planner/fanout/relay-tree.js';
import type { Topology, TopologyHost, TopologySwitch } from '../../../src/planner/fanout/topology.js';
import { type CaseOptions, caseOf, type Outcome } from './case.js';
import { simulateMulticast } from './multicast.js';
import { type Pacing, standInPacing } from './pacing.js';
import { simulateRackMulticast } from './rack-multicast.js';
import { simulateReads } from './reads.js';

export const SCALE_KINDS = ['unicast', 'multicast', 'tree', 'tree of multicasts'] as const;
export type ScaleKind = (typeof SCALE_KINDS)[number];

export interface Figures {
  /** Until all hosts that live are full. */
  readonly allS: number;
  /** Until half of them are, and 99 of 100. */
  readonly halfS: number;
  readonly mostS: number;
  readonly rootEgressBytes: number;
}

export function simulate(kind: ScaleKind, options: CaseOptions, pacing: Pacing): Figures {
  const { fullS, rootEgressBytes } = outcomeOf(kind, options, pacing);
  const times = fullS.filter((s) => s !== null).toSorted((a, b) => a - b);
  const at = (share: number): number => times[Math.max(0, Math.ceil(share * times.length) - 1)] ?? 0;
  return { allS: at(1), halfS: at(0.5), mostS: at(0.99), rootEgressBytes };
}

function outcomeOf(kind: ScaleKind, options: CaseOptions, pacing: Pacing): Outcome {
  const world = caseOf(options);
  const { hosts, topology, degree } = world;
  const readers = [...hosts.keys()].slice(1);
  switch (kind) {
    case 'unicast':
      return simulateReads(world, { readers, parents: () => [] });
    case 'multicast':
      return simulateMulticast(world, pacing);
    case 'tree of multicasts':
      return simulateRackMulticast(world);
    default: {
      const indexOf = new Map(hosts.map((host, index) => [host, index]));
      const { chains } = relayTree({ topology, root: hosts[0] ?? '', hosts: hosts.slice(1), degree });
      const parents = hosts.map((host) => (chains.get(host) ?? []).map((name) => indexOf.get(name) ?? 0));
      return simulateReads(world, { readers, parents: (host) => parents[host] ?? [] });
    }
  }
}

export interface ScaleTopology {
  readonly topology: Topology;
  readonly hosts: readonly string[];
}

/** `hostCount` hosts and the root in racks of `rackHosts`, these in pods of `podRacks`. */
export function clusterOf(hostCount: number, rackHosts: number, podRacks: number): ScaleTopology {
  const switches: TopologySwitch[] = [{ name: 'core', parent: null, linkSpeed: null }];
  const hosts = new Map<string, TopologyHost>();
  let pod = 0;
  for (let rack = 0; hosts.size <= hostCount; rack++) {
    if (rack % podRacks === 0) pod = switches.push({ name: `pod${rack / podRacks}`, parent: 0, linkSpeed: null }) - 1;
    const leaf = switches.push({ name: `rack${rack}`, parent: pod, linkSpeed: null }) - 1;
    for (let n = 0; n < rackHosts && hosts.size <= hostCount; n++)
      hosts.set(`h${hosts.size}`, { leaf, linkSpeed: null });
  }
  const topology: Topology = { origin: 'the model', switches, hosts, linkSpeedUnit: 'arbitrary' };
  return { topology, hosts: [...hosts.keys()] };
}

export interface Prediction {
  readonly seconds: number;
  readonly rootEgressBytes: number;
}

/**
 * What a small fan-out should take, to hold against a real one: all hosts at one switch, from the first byte until all
 * hosts are full, without setting anything up. `hosts` read the image; the root is not among them.
 */
export function predict(question: {
  readonly hosts: number;
  readonly imageBytes: number;
  readonly linkBytesPerS: number;
  readonly loss: number;
  readonly kind: Fanout;
  readonly pacing?: Pacing;
}): Prediction {
  const { hosts, imageBytes, linkBytesPerS, loss, kind, pacing = standInPacing } = question;
  const figures = simulate(
    kind,
    { ...quiet(imageBytes, linkBytesPerS), ...clusterOf(hosts, hosts + 1, 1), loss },
    pacing,
  );
  return { seconds: figures.allS, rootEgressBytes: figures.rootEgressBytes };
}

/** Nothing is lost, slow or dead. */
export function quiet(imageBytes: number, linkBytesPerS: number): Omit<CaseOptions, 'topology' | 'hosts'> {
  return {
    ...{ imageBytes, linkBytesPerS, oversubscription: 4, loss: 0, degree: FANOUT_DEGREE, seed: 1 },
    stragglers: { share: 0, factor: 1 },
    deaths: { share: 0, withinS: 0 },
  };
}

/** Checks that the switches of a file are a tree, and builds it. Each check looks at each name once. */
import { TOPOLOGY_LEVELS_MAX, type Topology, type TopologyHost, type TopologySwitch } from './topology.js';
import { type Place, topologyMistake } from './topology-mistake.js';

/** A switch as its file says. */
export interface SwitchDraft {
  readonly name: string;
  readonly line: number;
  readonly switches: readonly string[];
  readonly hosts: readonly { readonly name: string; readonly linkSpeed: number | null }[];
  readonly linkSpeed: number | null;
}

export interface TopologyDraft {
  readonly switches: readonly SwitchDraft[];
  readonly linkSpeedUnit: Topology['linkSpeedUnit'];
  /** The only switch that may be at the top. Null: the file does not say. */
  readonly root: { readonly name: string; readonly line: number } | null;
}

/** Throws SPEC_INVALID. */
export function buildTopology(file: string, draft: TopologyDraft): Topology {
  const { switches: drafts, linkSpeedUnit } = draft;
  const at = (line: number | null): Place => ({ file, line });
  if (drafts.length === 0) throw topologyMistake(at(null), 'no switch', 'at least one switch with hosts');
  const indexOf = new Map<string, number>();
  for (const [index, { name, line, switches, hosts }] of drafts.entries()) {
    const first = indexOf.get(name);
    if (first !== undefined) {
      const found = `switch ${name}, which line ${drafts[first]?.line} has already`;
      throw topologyMistake(at(line), found, 'each switch once');
    }
    indexOf.set(name, index);
    if (switches.length > 0 && hosts.length > 0) {
      throw topologyMistake(at(line), `switches and hosts at switch ${name}`, 'either switches or hosts');
    }
    if (switches.length + hosts.length === 0) {
      throw topologyMistake(at(line), `nothing at switch ${name}`, 'at least one switch or host');
    }
  }

  const parents = drafts.map((): number | null => null);
  const hosts = new Map<string, TopologyHost>();
  for (const [index, { name, line, switches, hosts: own }] of drafts.entries()) {
    for (const child of switches) {
      const below = indexOf.get(child);
      if (below === undefined) {
        throw topologyMistake(at(line), `${child} below switch ${name}`, 'a switch that the file describes');
      }
      const parent = parents[below] ?? null;
      if (parent !== null && parent !== index) {
        const found = `switch ${child} below ${name}, and below ${drafts[parent]?.name}`;
        throw topologyMistake(at(line), found, 'each switch below one other');
      }
      parents[below] = index;
    }
    for (const { name: host, linkSpeed } of own) {
      const leaf = hosts.get(host)?.leaf;
      if (leaf !== undefined && leaf !== index) {
        const found = `host ${host} at switch ${name}, and at ${drafts[leaf]?.name}`;
        throw topologyMistake(at(line), found, 'each host at one switch');
      }
      if (leaf === undefined) hosts.set(host, { leaf: index, linkSpeed });
    }
  }
  checkLevels(drafts, parents, at);
  checkRoot(draft, parents, at);
  const switches = drafts.map(
    ({ name, linkSpeed }, index): TopologySwitch => ({ name, linkSpeed, parent: parents[index] ?? null }),
  );
  return { origin: file, switches, hosts, linkSpeedUnit };
}

/** Each switch has one parent at most. So one from which no way leads to the top is in a circle or below one. */
function checkLevels(
  drafts: readonly SwitchDraft[],
  parents: readonly (number | null)[],
  at: (line: number) => Place,
): void {
  /** How many switches are above; 0 while not known. */
  const levels = drafts.map(() => 0);
  for (const start of drafts.keys()) {
    const way: number[] = [];
    const onWay = new Set<number>();
    let next: number | null = start;
    while (next !== null && levels[next] === 0) {
      const { name = '', line = 0 } = drafts[next] ?? {};
      if (onWay.has(next)) {
        const circle = way.slice(way.indexOf(next)).map((index) => drafts[index]?.name);
        const some = circle.length > 6 ? [...circle.slice(0, 5), '…'] : circle;
        throw topologyMistake(at(line), `a circle of switches: ${[...some, name].join(' below ')}`, 'a tree');
      }
      way.push(next);
      onWay.add(next);
      next = parents[next] ?? null;
    }
    let level = next === null ? 0 : (levels[next] ?? 0);
    for (const index of way.reverse()) levels[index] = ++level;
    if (level > TOPOLOGY_LEVELS_MAX) {
      const found = `${level} switches above each other`;
      throw topologyMistake(at(drafts[start]?.line ?? 0), found, `at most ${TOPOLOGY_LEVELS_MAX}`);
    }
  }
}

function checkRoot(
  { switches: drafts, root }: TopologyDraft,
  parents: readonly (number | null)[],
  at: (line: number) => Place,
): void {
  if (root === null) return;
  const tops = drafts.filter((_, index) => parents[index] === null);
  if (!drafts.some(({ name }) => name === root.name)) {
    throw topologyMistake(at(root.line), `${root.name} as the root`, 'a switch that the file describes');
  }
  const other = tops.find(({ name }) => name !== root.name);
  if (other === undefined) return;
  const found = `switch ${other.name}, which is below no other`;
  throw topologyMistake(at(other.line), found, `only ${root.name}, the root, at the top`);
}

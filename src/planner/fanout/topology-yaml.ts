/**
 * Reads a topology from YAML: our own form, a map with `switches` and perhaps `root`, or the list of topologies of
 * Slurm's topology.yaml, of which the default one counts if it is a tree, else the first tree.
 */
import { parseYamlWithLines, YamlMistake } from '../../kit/yaml.js';
import type { SwitchDraft, TopologyDraft } from './build-topology.js';
import { expandNames, isName, nameExpected } from './names.js';
import { TOPOLOGY_NAMES_MAX } from './topology.js';
import { shown, topologyMistake } from './topology-mistake.js';

type Path = readonly (string | number)[];

/** Throws SPEC_INVALID. */
export async function readTopologyYaml(file: string, text: string): Promise<TopologyDraft> {
  try {
    const { value, lineOf } = await parseYamlWithLines(text);
    const reader = new Reader(file, lineOf);
    return Array.isArray(value) ? slurmTopology(reader, value) : ownTopology(reader, value);
  } catch (error) {
    if (!(error instanceof YamlMistake)) throw error;
    const found = shown(error.message.split('\n')[0] ?? '');
    throw topologyMistake({ file, line: error.line }, `a mistake in the YAML (${found})`, 'YAML');
  }
}

/** Where the reader is in the document, and what it says if the document is not as expected. */
class Reader {
  readonly #file: string;
  readonly #lineOf: (path: Path) => number;
  #nameCount = 0;

  constructor(file: string, lineOf: (path: Path) => number) {
    this.#file = file;
    this.#lineOf = lineOf;
  }

  line(path: Path): number {
    return this.#lineOf(path);
  }

  fail(path: Path, found: string, expected: string): never {
    throw topologyMistake({ file: this.#file, line: this.#lineOf(path) }, found, expected);
  }

  /** A map with no other keys than these. */
  map<Key extends string>(path: Path, value: unknown, keys: readonly Key[]): { readonly [K in Key]?: unknown } {
    const expected = `a map with ${keys.join(', ')}`;
    if (typeof value !== 'object' || value === null || Array.isArray(value)) this.fail(path, kindOf(value), expected);
    const known: readonly string[] = keys;
    const unknown = Object.keys(value).find((key) => !known.includes(key));
    if (unknown !== undefined) this.fail([...path, unknown], `the key ${shown(unknown)}`, expected);
    return value;
  }

  list(path: Path, value: unknown, expected: string): readonly unknown[] {
    if (!Array.isArray(value)) this.fail(path, kindOf(value), expected);
    return value;
  }

  /** A number is a name too: YAML reads `7` as one. */
  name(path: Path, value: unknown): string {
    const name = typeof value === 'number' ? String(value) : value;
    if (typeof name !== 'string' || !isName(name)) this.fail(path, kindOf(value), nameExpected);
    return name;
  }

  /** An expression, or null for none. */
  names(path: Path, value: unknown): string[] {
    if (value === undefined || value === null) return [];
    const text = typeof value === 'number' ? String(value) : value;
    if (typeof text !== 'string') this.fail(path, kindOf(value), nameExpected);
    const place = { file: this.#file, line: this.#lineOf(path) };
    const names = expandNames(text, place, TOPOLOGY_NAMES_MAX - this.#nameCount);
    this.#nameCount += names.length;
    return names;
  }

  speed(path: Path, value: unknown): number | null {
    if (value === undefined || value === null) return null;
    if (typeof value !== 'number' || !(value > 0) || value > SPEED_MBIT_PER_S_MAX) {
      this.fail(path, kindOf(value), 'a number of Mbit/s above 0, such as 25000');
    }
    return value;
  }
}

const SPEED_MBIT_PER_S_MAX = 1e9;

function kindOf(value: unknown): string {
  if (value === undefined) return 'nothing';
  if (Array.isArray(value)) return 'a list';
  return typeof value === 'object' && value !== null ? 'a map' : shown(JSON.stringify(value) ?? typeof value);
}

// ---- our own form

function ownTopology(reader: Reader, value: unknown): TopologyDraft {
  const { root, switches } = reader.map([], value, ['root', 'switches']);
  return {
    switches: reader.list(['switches'], switches, 'a list of switches').map((item, index) => {
      const path = ['switches', index];
      const fields = reader.map(path, item, ['name', 'switches', 'hosts', 'linkMbitPerS']);
      return {
        name: reader.name([...path, 'name'], fields.name),
        line: reader.line(path),
        switches: itemsOf([...path, 'switches'], fields.switches).flatMap(([at, names]) => reader.names(at, names)),
        hosts: itemsOf([...path, 'hosts'], fields.hosts).flatMap(([at, host]) => hostsOf(reader, at, host)),
        linkSpeed: reader.speed([...path, 'linkMbitPerS'], fields.linkMbitPerS),
      };
    }),
    linkSpeedUnit: 'mbitPerS',
    root: root === undefined ? null : { name: reader.name(['root'], root), line: reader.line(['root']) },
  };
}

/** One item, or a list of items. */
function itemsOf(path: Path, value: unknown): (readonly [Path, unknown])[] {
  return Array.isArray(value) ? value.map((item, index) => [[...path, index], item] as const) : [[path, value]];
}

/** An expression, or a map with an expression and the speed of these hosts. */
function hostsOf(reader: Reader, path: Path, value: unknown): SwitchDraft['hosts'] {
  const isMap = typeof value === 'object' && value !== null;
  const fields = isMap ? reader.map(path, value, ['name', 'linkMbitPerS']) : { name: value };
  const linkSpeed = reader.speed([...path, 'linkMbitPerS'], fields.linkMbitPerS);
  return reader.names(isMap ? [...path, 'name'] : path, fields.name).map((name) => ({ name, linkSpeed }));
}

// ---- Slurm's topology.yaml

/** The kinds of Slurm's topologies. Only the tree says which hosts are near each other in a way that is used here. */
const SLURM_KEYS = ['topology', 'cluster_default', 'tree', 'block', 'flat', 'ring', 'torus3d'] as const;

function slurmTopology(reader: Reader, topologies: readonly unknown[]): TopologyDraft {
  const trees = topologies.flatMap((value, index) => {
    const fields = reader.map([index], value, SLURM_KEYS);
    return fields.tree === undefined ? [] : [{ index, isDefault: fields.cluster_default === true, tree: fields.tree }];
  });
  const chosen = trees.find(({ isDefault }) => isDefault) ?? trees[0];
  if (chosen === undefined) reader.fail([], 'no topology with a tree', 'a topology with tree: and its switches');
  const path = [chosen.index, 'tree'];
  const { switches } = reader.map(path, chosen.tree, ['switches']);
  return {
    switches: reader.list([...path, 'switches'], switches, 'a list of switches').map((item, index) => {
      const at = [...path, 'switches', index];
      const fields = reader.map(at, item, ['switch', 'children', 'nodes']);
      return {
        name: reader.name([...at, 'switch'], fields.switch),
        line: reader.line(at),
        switches: reader.names([...at, 'children'], fields.children),
        hosts: reader.names([...at, 'nodes'], fields.nodes).map((name) => ({ name, linkSpeed: null })),
        linkSpeed: null,
      };
    }),
    linkSpeedUnit: 'arbitrary',
    root: null,
  };
}

/** Reads the topology of a network from a file of its user. */
import { buildTopology } from './build-topology.js';
import { readSlurmConf } from './slurm-conf.js';
import { TOPOLOGY_BYTES_MAX, type Topology } from './topology.js';
import { topologyMistake } from './topology-mistake.js';
import { readTopologyYaml } from './topology-yaml.js';

export interface TopologyFile {
  /** Its end decides the format: .yaml, .yml and .json are YAML, all else is Slurm's topology.conf. */
  readonly name: string;
  readonly text: string;
  /** The hosts of the fork, the root included. Each must be in the file. */
  readonly hosts: readonly string[];
}

/**
 * Throws SPEC_INVALID with file and line, what was found and what was expected. Reads no more than TOPOLOGY_BYTES_MAX
 * and TOPOLOGY_NAMES_MAX, in a time that grows with these only.
 */
export async function readTopology({ name, text, hosts }: TopologyFile): Promise<Topology> {
  if (Buffer.byteLength(text) > TOPOLOGY_BYTES_MAX) {
    const found = `${Buffer.byteLength(text)} bytes`;
    throw topologyMistake(
      { file: name, line: null },
      found,
      `at most ${TOPOLOGY_BYTES_MAX}, with ranges: node[001-512]`,
    );
  }
  const isYaml = /\.(ya?ml|json)$/i.test(name);
  const drafts = isYaml ? await readTopologyYaml(name, text) : readSlurmConf(name, text);
  const topology = buildTopology(name, drafts);
  const missing = [...new Set(hosts)].filter((host) => !topology.hosts.has(host));
  if (missing.length > 0) {
    const some = `${missing.slice(0, 5).join(', ')}${missing.length > 5 ? ` and ${missing.length - 5} more` : ''}`;
    throw topologyMistake(
      { file: name, line: null },
      `no switch that has ${some}`,
      'every host of the fork at a switch',
    );
  }
  return topology;
}

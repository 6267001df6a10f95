/** The network between hosts as a tree of switches. */

/** A topology of 10 000 hosts has some 200 KiB, even without ranges. */
export const TOPOLOGY_BYTES_MAX = 1024 * 1024;
/** Hosts and switches together, with all ranges written out. */
export const TOPOLOGY_NAMES_MAX = 65_536;
/** Switches above each other, as many as Slurm allows. */
export const TOPOLOGY_LEVELS_MAX = 20;

export interface TopologySwitch {
  readonly name: string;
  /** Index of the switch above. Null: there is none. Several switches may be at the top; a network joins them. */
  readonly parent: number | null;
  /** Of the link to the switch above, in `Topology.linkSpeedUnit`. Null: not known. */
  readonly linkSpeed: number | null;
}

export interface TopologyHost {
  /** Index of its switch. */
  readonly leaf: number;
  /** Of the link to its switch, in `Topology.linkSpeedUnit`. Null: not known. */
  readonly linkSpeed: number | null;
}

/** A switch has either switches or hosts below it, at least one. */
export interface Topology {
  /** The file, or another text for people that says where the topology is from. */
  readonly origin: string;
  readonly switches: readonly TopologySwitch[];
  /** In the order of the file. */
  readonly hosts: ReadonlyMap<string, TopologyHost>;
  /** arbitrary: link speeds can only be compared with each other. */
  readonly linkSpeedUnit: 'mbitPerS' | 'arbitrary';
}

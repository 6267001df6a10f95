/**
 * The network of the model: a tree of switches. Each link carries what is sent over it in turn, each direction for
 * itself; a chunk goes on over the next link while it still arrives (cut-through).
 */
import type { Topology } from '../../../src/planner/fanout/topology.js';

export interface NetworkOptions {
  /** `hosts[0]` is the root. All of them are in the topology. */
  readonly topology: Topology;
  readonly hosts: readonly string[];
  /** Of the link of a host, by its index, in each direction. */
  readonly hostBytesPerS: (index: number) => number;
  /** How many times more all hosts below a switch can send than its link to the switch above. */
  readonly oversubscription: number;
  readonly hopS: number;
}

export class Network {
  readonly #hopS: number;
  /** For each host its link and those of the switches above it, lowest first; without the link of the top switch. */
  readonly #ways: number[][] = [];
  readonly #bytesPerS: number[] = [];
  /** When each link is free: what is sent upwards, then what is sent downwards. */
  readonly #freeUpS: Float64Array;
  readonly #freeDownS: Float64Array;
  #rootEgressBytes = 0;

  constructor({ topology, hosts, hostBytesPerS, oversubscription, hopS }: NetworkOptions) {
    this.#hopS = hopS;
    const linkOf = new Map<number, number>();
    const hostLinks = hosts.map((_, index) => this.#bytesPerS.push(hostBytesPerS(index)) - 1);
    for (const [index, host] of hosts.entries()) {
      const way = [hostLinks[index] ?? 0];
      let at = topology.hosts.get(host)?.leaf ?? null;
      while (at !== null) {
        const above: number | null = topology.switches[at]?.parent ?? null;
        if (above === null) break;
        const link = linkOf.get(at) ?? this.#bytesPerS.push(0) - 1;
        linkOf.set(at, link);
        // Of nominal links: a slow host does not make its switch slower.
        this.#bytesPerS[link] = (this.#bytesPerS[link] ?? 0) + hostBytesPerS(0) / oversubscription;
        way.push(link);
        at = above;
      }
      this.#ways.push(way);
    }
    // A rack with few of the hosts has the links of a whole one: at least those of four hosts.
    for (const link of linkOf.values()) {
      this.#bytesPerS[link] = Math.max(this.#bytesPerS[link] ?? 0, 4 * hostBytesPerS(0));
    }
    this.#freeUpS = new Float64Array(this.#bytesPerS.length);
    this.#freeDownS = new Float64Array(this.#bytesPerS.length);
  }

  get rootEgressBytes(): number {
    return this.#rootEgressBytes;
  }

  /** The slowest link from the root to a host. */
  bytesPerSTo(host: number): number {
    const ways = [...(this.#ways[0] ?? []), ...(this.#ways[host] ?? [])];
    return Math.min(...ways.map((link) => this.#bytesPerS[link] ?? 0));
  }

  /** Returns when the last byte is there. Calls must be in the order of `atS`. */
  send(from: number, to: number, bytes: number, atS: number): number {
    if (from === 0) this.#rootEgressBytes += bytes;
    const up = this.#ways[from] ?? [];
    const down = this.#ways[to] ?? [];
    // The highest links that are the same are above the switch where both ways meet.
    let same = 0;
    while (same < up.length && same < down.length && up[up.length - 1 - same] === down[down.length - 1 - same]) same++;
    let reachedS = atS;
    let endS = atS;
    const pass = (link: number, freeS: Float64Array): void => {
      const startS = Math.max(reachedS, freeS[link] ?? 0);
      const doneS = startS + bytes / (this.#bytesPerS[link] ?? 1);
      freeS[link] = doneS;
      reachedS = startS + this.#hopS;
      endS = Math.max(endS, doneS) + this.#hopS;
    };
    for (let index = 0; index < up.length - same; index++) pass(up[index] ?? 0, this.#freeUpS);
    for (let index = down.length - same - 1; index >= 0; index--) pass(down[index] ?? 0, this.#freeDownS);
    return endS;
  }

  /** Sends once to all hosts at the sender's switch. Returns when the sender has sent the last byte. */
  sendToRack(from: number, bytes: number, atS: number): number {
    if (from === 0) this.#rootEgressBytes += bytes;
    const link = this.#ways[from]?.[0] ?? 0;
    const doneS = Math.max(atS, this.#freeUpS[link] ?? 0) + bytes / (this.#bytesPerS[link] ?? 1);
    this.#freeUpS[link] = doneS;
    return doneS + this.#hopS;
  }

  /** Counts what the root has sent to the group. The caller has taken care of the time. */
  noteMulticast(bytes: number): void {
    this.#rootEgressBytes += bytes;
  }
}

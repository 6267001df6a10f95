/** Decides which host reads the image from which other one, along the topology. Pure. */
import { type Scope, scopesOf } from './scopes.js';
import type { Topology } from './topology.js';

export interface RelayQuestion {
  /** Null: all hosts are in one rack. */
  readonly topology: Topology | null;
  readonly root: string;
  /** The hosts that join. The root is ignored if it is among them. */
  readonly hosts: readonly string[];
  /** How many hosts read from one host at most, the root included. At least 1. */
  readonly degree: number;
}

export interface RelayTree {
  /** The host that each host reads from; may be the root. A host comes after the one that it reads from. */
  readonly parents: ReadonlyMap<string, string>;
  /** For each host its parents without the root, nearest first, at most PARENTS_MAX. Empty: it reads from the root. */
  readonly chains: ReadonlyMap<string, readonly string[]>;
  /** The longest way from the root to a host, in hosts: 1 if all read from the root. */
  readonly depth: number;
}

/** A host connects to that many of its parents. One that is lost is replaced by the next one, at last by the root. */
export const PARENTS_MAX = 3;

/**
 * Builds the tree from the root, nearest hosts first, so that it is as flat as the degree allows. The image enters each
 * scope once: one host of it, its *relay*, reads from outside, all others from within. A host serves relays of other
 * scopes before its own rack, the outermost scopes first, because the most hosts wait behind these.
 *
 * Invariant: a scope that still lacks hosts has a host in it that may serve one more. So a host serves another scope
 * only if that leaves such a place in each of its own scopes that lacks hosts. A host in a scope adds `degree` places
 * and takes one, so placing hosts within the scope never breaks this, and every host finds a place.
 */
export function relayTree({ topology, root, hosts, degree }: RelayQuestion): RelayTree {
  const builder = new TreeBuilder(scopesOf(topology, [root, ...hosts]), Math.max(1, Math.floor(degree)));
  return builder.build(root);
}

interface Progress {
  readonly scope: Scope;
  readonly outer: Progress | null;
  readonly children: Progress[];
  /** Hosts within that have no place yet. */
  absentCount: number;
  /** How many more hosts those within may serve. */
  freeCount: number;
  /** Of a rack: the next host to place. Else: the next child that may be without a host. */
  next: number;
}

class TreeBuilder {
  readonly #degree: number;
  readonly #racks = new Map<string, Progress>();
  readonly #parents = new Map<string, string>();
  readonly #depths = new Map<string, number>();
  #root = '';

  constructor(whole: Scope, degree: number) {
    this.#degree = degree;
    this.#progress(whole, null);
  }

  #progress(scope: Scope, outer: Progress | null): Progress {
    const own: Progress = { scope, outer, children: [], absentCount: scope.hostCount, freeCount: 0, next: 0 };
    for (const host of scope.hosts) this.#racks.set(host, own);
    for (const child of scope.children) own.children.push(this.#progress(child, own));
    return own;
  }

  build(root: string): RelayTree {
    this.#root = root;
    const placed = [root];
    this.#place(root, 0);
    let depth = 0;
    for (let at = 0; at < placed.length; at++) {
      const server = placed[at] ?? root;
      for (let served = 0; served < this.#degree; served++) {
        const host = this.#nextFor(server);
        if (host === null) break;
        this.#parents.set(host, server);
        depth = (this.#depths.get(server) ?? 0) + 1;
        this.#take(server);
        this.#place(host, depth);
        placed.push(host);
      }
    }
    const chains = new Map(placed.slice(1).map((host): [string, string[]] => [host, this.#chainOf(host)]));
    return { parents: this.#parents, chains, depth };
  }

  #place(host: string, depth: number): void {
    this.#depths.set(host, depth);
    for (let own: Progress | null = this.#racks.get(host) ?? null; own !== null; own = own.outer) {
      own.absentCount--;
      own.freeCount += this.#degree;
    }
  }

  #take(server: string): void {
    for (let own: Progress | null = this.#racks.get(server) ?? null; own !== null; own = own.outer) own.freeCount--;
  }

  /** Returns the host that reads from the server next, or null if none may. */
  #nextFor(server: string): string | null {
    let found: string | null = null;
    for (let own: Progress | null = this.#racks.get(server) ?? null; own !== null; own = own.outer) {
      found = this.#waitingIn(own) ?? found;
      if (own.absentCount > 0 && own.freeCount < 2) break;
    }
    return found;
  }

  /** A host of the rack, or the relay of a scope directly within that has no host yet. */
  #waitingIn(own: Progress): string | null {
    if (own.children.length === 0) return this.#firstAbsent(own);
    for (; own.next < own.children.length; own.next++) {
      const child = own.children[own.next];
      if (child !== undefined && child.absentCount === child.scope.hostCount) return this.#relayOf(child);
    }
    return null;
  }

  #relayOf(within: Progress): string | null {
    let rack = within;
    for (let inner = rack.children[0]; inner !== undefined; inner = rack.children[0]) rack = inner;
    return this.#firstAbsent(rack);
  }

  #firstAbsent(rack: Progress): string | null {
    for (; rack.next < rack.scope.hosts.length; rack.next++) {
      const host = rack.scope.hosts[rack.next];
      if (host !== undefined && !this.#depths.has(host)) return host;
    }
    return null;
  }

  #chainOf(host: string): string[] {
    const chain: string[] = [];
    let parent = this.#parents.get(host);
    while (parent !== undefined && parent !== this.#root && chain.length < PARENTS_MAX) {
      chain.push(parent);
      parent = this.#parents.get(parent);
    }
    return chain;
  }
}

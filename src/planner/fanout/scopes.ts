/**
 * The part of a topology that some hosts need, as scopes within scopes. A scope is a rack (hosts at one switch) or what
 * is below a switch. Switches with only one of these below them are left out: nothing is decided there.
 */
import type { Topology } from './topology.js';

export interface Scope {
  /** Null: this is the whole. */
  readonly parent: Scope | null;
  /** Those with the fastest links first, then the largest. Empty in a rack. */
  readonly children: readonly Scope[];
  /** Of a rack, those with the fastest links first; else in the order of the file. Empty if there are children. */
  readonly hosts: readonly string[];
  /** All hosts within. */
  readonly hostCount: number;
  /** How many scopes are around. */
  readonly level: number;
}

interface Draft {
  readonly index: number | null;
  readonly speed: number;
  readonly children: Draft[];
  readonly hosts: string[];
  hostCount: number;
}

/** Hosts that the topology does not name are a rack of their own. Null: all hosts are in one rack. */
export function scopesOf(topology: Topology | null, hosts: readonly string[]): Scope {
  const wanted = new Set(hosts);
  if (topology === null) return scope({ ...draftOf(null, 0), hosts: [...wanted], hostCount: wanted.size }, null);

  const top = draftOf(null, 0);
  const drafts = new Map<number, Draft>();
  const draftAt = (index: number): Draft => {
    const known = drafts.get(index);
    if (known !== undefined) return known;
    const own = topology.switches[index];
    const draft = draftOf(index, own?.linkSpeed ?? 0);
    drafts.set(index, draft);
    const parent = own?.parent ?? null;
    (parent === null ? top : draftAt(parent)).children.push(draft);
    return draft;
  };
  // In the order of the file, so that the order of the wishes of a fork does not matter.
  const named = [...topology.hosts].filter(([host]) => wanted.delete(host));
  const bySpeed = named.toSorted(([, a], [, b]) => (b.linkSpeed ?? 0) - (a.linkSpeed ?? 0));
  for (const [host, { leaf }] of bySpeed) draftAt(leaf).hosts.push(host);
  if (wanted.size > 0) {
    const others = draftOf(null, 0);
    others.hosts.push(...[...wanted].toSorted());
    top.children.push(others);
  }
  return scope(counted(top), null);
}

function draftOf(index: number | null, speed: number): Draft {
  return { index, speed, children: [], hosts: [], hostCount: 0 };
}

/** Levels of a topology are few, so calls may nest that deep. */
function counted(draft: Draft): Draft {
  draft.hostCount = draft.hosts.length;
  for (const child of draft.children) draft.hostCount += counted(child).hostCount;
  return draft;
}

function scope(whole: Draft, parent: Scope | null): Scope {
  let draft = whole;
  for (let only = draft.children[0]; only !== undefined && draft.children.length === 1; only = draft.children[0]) {
    draft = only;
  }
  const children: Scope[] = [];
  const { hosts, hostCount } = draft;
  const own: Scope = { parent, children, hosts, hostCount, level: parent === null ? 0 : parent.level + 1 };
  const order = draft.children.toSorted(
    (a, b) => b.speed - a.speed || b.hostCount - a.hostCount || (a.index ?? Infinity) - (b.index ?? Infinity),
  );
  for (const child of order) children.push(scope(child, own));
  return own;
}

/** The racks within, in order. */
export function racksOf({ children, ...own }: Scope): Scope[] {
  return children.length === 0 ? [{ children, ...own }] : children.flatMap(racksOf);
}

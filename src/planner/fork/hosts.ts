/** Plans on which hosts a fork makes its clones: who takes part, who makes which clones, how the image travels. */
import type { ForkRequest, HostShare, HostWish } from '../../domain/fork.js';
import type { ForkInventory, HostInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import type { Transport } from '../../domain/transport.js';
import { joinDisks, notesOfDisks } from './join-disks.js';
import { checkJoin, checkShare, chooseForkTransport, type JoinFacts, roomFor } from './join-preflight.js';
import { type HostRoom, placeClones, sharesOf } from './place.js';

/** Connections of one image session at its holder (native/transport/limits.hpp), two for each reader. */
const READERS_MAX = 128;

export interface HostsFacts {
  /** The host of the parent or image. */
  readonly root: HostInventory;
  /** The other hosts of the request, in its order. */
  readonly joins: readonly JoinFacts[];
}

export interface HostsPlan {
  readonly shares: readonly HostShare[];
  /** Absent if no other host takes part. */
  readonly transport?: Transport;
  readonly transportReason?: string;
  readonly notes: readonly string[];
}

type Planned =
  | { readonly plan: HostsPlan; readonly refusals: readonly [] }
  | { readonly plan: null; readonly refusals: readonly Refusal[] };

/** `inventory` is that of the root. */
export function planHosts(
  request: ForkRequest,
  wishes: readonly HostWish[],
  inventory: ForkInventory,
  facts: HostsFacts,
): Planned {
  const { root, joins } = facts;
  const { isPartialAllowed, cloneCount, placement = 'spread' } = request;
  const refusals: Refusal[] = [];
  const notes: string[] = [];
  const unfit = new Set<string>();
  const ofUnfit: Refusal[] = [];
  for (const join of joins) {
    const found = checkJoin(request, root, inventory, join);
    if (found.length === 0) continue;
    unfit.add(join.host);
    ofUnfit.push(...found);
    if (isPartialAllowed) notes.push(`${join.host} is left out: ${found.map(({ reason }) => reason).join('; ')}`);
    else refusals.push(...found);
  }
  if (refusals.length > 0) return { plan: null, refusals };

  const forkOf = (host: string): ForkInventory | null => {
    if (host === root.host) return inventory;
    const join = joins.find((candidate) => candidate.host === host);
    return join?.kind === 'reachable' && !unfit.has(host) ? join.fork : null;
  };
  const rooms = wishes.map(({ host }): HostRoom => {
    const fork = forkOf(host);
    const join = joins.find((candidate) => candidate.host === host);
    const host_ = host === root.host ? root : join?.kind === 'reachable' ? join.inventory : null;
    return { host, count: fork === null ? 0 : roomFor(request, fork), cpuCount: host_?.cpuCount ?? null };
  });
  const counts = placeClones({ cloneCount, placement, wishes, rooms, isPartialAllowed });
  const shares = sharesOf(root.host, wishes, counts)
    .filter(({ host }) => !unfit.has(host))
    .map((share): HostShare => {
      const join = joins.find(({ host }) => host === share.host);
      if (join?.kind !== 'reachable' || inventory.vm.spec.disks.length === 0) return share;
      const { disks } = joinDisks(request, root, inventory, join);
      notes.push(...notesOfDisks(root.host, share.host, disks));
      return { ...share, disks: disks.map(({ id, access }) => ({ id, access })) };
    });
  const placedCount = counts.reduce((sum, count) => sum + count, 0);
  for (const { host, count } of shares) {
    const fork = forkOf(host);
    if (fork !== null) refusals.push(...checkShare(request, host, fork, count));
  }
  if (placedCount < cloneCount && (!isPartialAllowed || placedCount === 0)) {
    refusals.push(...ofUnfit, tooMany(cloneCount, rooms));
  }
  if (refusals.length > 0) return { plan: null, refusals };

  if (placedCount < cloneCount) notes.push(`there is room for ${placedCount} clones; the report will list the others`);
  const names = new Set(shares.map(({ host }) => host));
  if (!wishes.some(({ host }) => host === root.host)) {
    notes.push(`${root.host}, the host of ${inventory.vm.spec.name}, makes no clones, because it is not named`);
  }
  const joining = joins.filter(({ host }) => names.has(host));
  if (joining.length === 0) return { plan: { shares, notes }, refusals: [] };
  if (joining.length > READERS_MAX) return { plan: null, refusals: [tooManyReaders(root.host, joining.length)] };
  const { transport, reason, refusals: obstacles } = chooseForkTransport(request, root, inventory.vm, joining);
  if (obstacles.length > 0) return { plan: null, refusals: obstacles };
  return { plan: { shares, transport, transportReason: reason, notes }, refusals: [] };
}

function tooManyReaders(host: string, count: number): Refusal {
  return {
    code: 'HOST_LIMIT',
    reason: `${count} hosts would read the image from ${host}, which serves ${READERS_MAX} at most`,
    remedy: 'name fewer hosts',
  };
}

function tooMany(cloneCount: number, rooms: readonly HostRoom[]): Refusal {
  const total = rooms.reduce((sum, { count }) => sum + count, 0);
  const each = rooms.map(({ host, count }) => `${host} ${count}`).join(', ');
  return {
    code: 'CLONE_MEMORY',
    reason: `the hosts have room for ${total} of ${cloneCount} clones: ${each}`,
    remedy: total > 0 ? `use --clones ${total}, name more hosts, or add --partial` : 'free memory, or name other hosts',
  };
}

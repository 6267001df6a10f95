/** Plans on which hosts a fork makes its clones: who takes part, who makes which clones, how the image travels. */
import { strongest } from '../../domain/data-security.js';
import type { FanoutPlan, ProbedGroup } from '../../domain/fanout.js';
import type { ForkRequest, HostShare, HostWish } from '../../domain/fork.js';
import { DISK_TUNNELS_MAX, type ForkInventory, type HostInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import { type Transport, transportRow } from '../../domain/transport.js';
import type { Topology } from '../fanout/topology.js';
import { planFanout } from './fanout.js';
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
  /** Null: nobody has said which hosts share a switch. */
  readonly topology: Topology | null;
  /** Which hosts a multicast of the root gets to, by each way that was tried, the best first. */
  readonly probes: readonly ProbedGroup[];
}

export interface HostsPlan {
  readonly shares: readonly HostShare[];
  /** Absent if no other host takes part. */
  readonly transport?: Transport;
  readonly transportReason?: string;
  readonly fanout?: FanoutPlan;
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

  const fit = joins.filter(({ host }) => !unfit.has(host));
  const rooms = wishes.map(({ host }) => roomOf(request, host, inventory, { root, joins: fit }));
  const counts = placeClones({ cloneCount, placement, wishes, rooms, isPartialAllowed });
  const shares = sharesOf(root.host, wishes, counts)
    .filter(({ host }) => !unfit.has(host))
    .map((share): HostShare => {
      const join = fit.find(({ host }) => host === share.host);
      if (join?.kind !== 'reachable' || inventory.vm.spec.disks.length === 0) return share;
      const { disks } = joinDisks(request, root, inventory, join);
      notes.push(...notesOfDisks(root.host, share.host, disks));
      return { ...share, disks: disks.map(({ id, access }) => ({ id, access })) };
    });
  const placedCount = counts.reduce((sum, count) => sum + count, 0);
  for (const { host, count } of shares) {
    const fork = forkOf(host, inventory, { root, joins: fit });
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
  const joining = fit.filter(({ host }) => names.has(host));
  if (joining.length === 0) return { plan: { shares, notes }, refusals: [] };
  const { transport, reason, refusals: obstacles } = chooseForkTransport(request, root, inventory.vm, joining);
  const limits = [...checkReaders(root.host, inventory, joining), ...checkTunnels(root.host, shares)];
  if (obstacles.length + limits.length > 0) return { plan: null, refusals: [...limits, ...obstacles] };
  const { topology, probes } = facts;
  const hosts = joining.map(({ host }) => host);
  const ends = joining.map((join) => (join.kind === 'reachable' ? join.inventory.dataSecurity : undefined));
  const demands = [root.dataSecurity, request.dataSecurity, ...ends].filter((one) => one !== undefined);
  const isEncrypted = strongest(...demands) === 'encrypt' && !transportRow(transport).sameMachineOnly;
  const fanned = planFanout(request, { root: root.host, hosts, transport, inventory, topology, probes, isEncrypted });
  if (fanned.plan === null) return { plan: null, refusals: fanned.refusals };
  return { plan: { shares, transport, transportReason: reason, fanout: fanned.plan, notes }, refusals: [] };
}

/** What the host has said of its room, or null if it takes no part. `inventory` is the root's. */
function forkOf(
  host: string,
  inventory: ForkInventory,
  { root, joins }: Pick<HostsFacts, 'root' | 'joins'>,
): ForkInventory | null {
  if (host === root.host) return inventory;
  const join = joins.find((candidate) => candidate.host === host);
  return join?.kind === 'reachable' ? join.fork : null;
}

function roomOf(
  request: ForkRequest,
  host: string,
  inventory: ForkInventory,
  facts: Pick<HostsFacts, 'root' | 'joins'>,
): HostRoom {
  const fork = forkOf(host, inventory, facts);
  const join = facts.joins.find((candidate) => candidate.host === host);
  const own = host === facts.root.host ? facts.root : join?.kind === 'reachable' ? join.inventory : null;
  return { host, count: fork === null ? 0 : roomFor(request, fork), cpuCount: own?.cpuCount ?? null };
}

/** Hosts of earlier forks may read the image still. */
function* checkReaders(host: string, { image }: ForkInventory, joining: readonly JoinFacts[]): Iterable<Refusal> {
  const count = new Set([...(image?.readers ?? []), ...joining.map((join) => join.host)]).size;
  if (count <= READERS_MAX) return;
  yield {
    code: 'HOST_LIMIT',
    reason: `${count} hosts would read the image from ${host}, which serves ${READERS_MAX} at most`,
    remedy: 'name fewer hosts',
  };
}

/** Each clone on another host has a connection for each disk that is served to it. */
function* checkTunnels(host: string, shares: readonly HostShare[]): Iterable<Refusal> {
  const servedOf = ({ disks = [] }: HostShare): number => disks.filter(({ access }) => access === 'served').length;
  const count = shares.reduce((sum, share) => sum + share.count * servedOf(share), 0);
  if (count <= DISK_TUNNELS_MAX) return;
  yield {
    code: 'HOST_LIMIT',
    reason: `the clones would have ${count} connections to disks of ${host}, which serves ${DISK_TUNNELS_MAX} at most`,
    remedy: 'share the disks, or use fewer clones',
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

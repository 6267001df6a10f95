/** Checks whether a host can join a fork: make clones on an image that it reads from the root. Pure. */
import type { MigrationError } from '../../domain/errors.js';
import type { ForkRequest } from '../../domain/fork.js';
import type { ForkInventory, HostInventory, TargetChecks, VmInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import { type Transport, transportRow } from '../../domain/transport.js';
import type { StorageFacts } from '../compared-files.js';
import { checkLimits, checkState, vmCountWithinLimits } from '../limits.js';
import { checkTransport, rankedTransports } from '../migration/transport.js';
import { checkBootFiles, checkBridges, checkPeers, checkPolicy, checkQemu } from '../target-host.js';
import { cloneCountThatFits } from './clone-room.js';
import { checkMemory, checkNames } from './host-checks.js';
import { joinDisks } from './join-disks.js';

/** What a host that is to join a fork says. */
export type JoinFacts =
  | { readonly kind: 'unreachable'; readonly host: string; readonly error: MigrationError }
  | {
      readonly kind: 'reachable';
      readonly host: string;
      readonly inventory: HostInventory;
      readonly checks: TargetChecks;
      readonly fork: ForkInventory;
      /** The parent's files. */
      readonly storage: StorageFacts;
    };

/** The checks that do not depend on how many clones the host makes. */
export function checkJoin(
  request: ForkRequest,
  root: HostInventory,
  ofRoot: ForkInventory,
  joins: JoinFacts,
): Refusal[] {
  const { host } = joins;
  const { vm } = ofRoot;
  if (joins.kind === 'unreachable') {
    const { message, remedy } = joins.error;
    const advice = `check that vmigrated runs on ${host}, and that ${root.host} knows it as a peer; or leave it out`;
    return [{ code: 'TARGET_UNREACHABLE', reason: `${host} does not answer: ${message}`, remedy: remedy ?? advice }];
  }
  const { inventory, checks, fork } = joins;
  const { disks, refusals } = joinDisks(request, root, ofRoot, joins);
  const shared = new Set(disks.flatMap(({ id, access }) => (access === 'shared' ? [id] : [])));
  const opened = vm.spec.disks.flatMap(({ id, path }) => (shared.has(id) ? [path] : []));
  return [
    ...checkPeers(root, inventory),
    ...checkQemu(inventory, vm, { isPaged: true, fetches: true }),
    ...checkPolicy(host, vm.spec.name, checks, opened),
    ...checkBootFiles(host, vm.spec, checks),
    ...(request.network === 'fresh' ? checkBridges(inventory, vm.spec) : []),
    ...refusals,
    ...checkImageThere(host, fork),
    ...checkNames(host, fork),
    ...checkState(host, fork.stateFreeBytes),
  ];
}

/** Checks the room for the clones that the placement has given the host. */
export function checkShare(request: ForkRequest, host: string, fork: ForkInventory, count: number): Refusal[] {
  const own = { ...request, cloneCount: count };
  return [
    ...checkMemory(own, host, fork),
    ...checkLimits(host, fork.limits, { vmCount: count, cpus: fork.vm.spec.cpus }),
  ];
}

/** Returns how many clones the host has room for, at most those of the whole fork. */
export function roomFor(request: ForkRequest, fork: ForkInventory): number {
  if (!(fork.imageBytesFree >= fork.imageBytesNeeded)) return 0;
  const inMemory = cloneCountThatFits(request, fork);
  return vmCountWithinLimits(fork.limits, { vmCount: inMemory, cpus: fork.vm.spec.cpus });
}

/** Another fork may be bringing the image there, or has left only its disks. */
function* checkImageThere(host: string, { image }: ForkInventory): Iterable<Refusal> {
  if (image === null || image.state === 'complete') return;
  yield {
    code: 'IMAGE_INCOMPLETE',
    reason: `image ${image.id} on ${host} is ${image.state}, not complete`,
    remedy:
      image.state === 'filling'
        ? `wait until it is complete: "vmctl images" on ${host}`
        : `remove it there: "vmctl image rm ${image.id}"`,
  };
}

export interface ForkTransport {
  readonly transport: Transport;
  /** Why, for a person. */
  readonly reason: string;
  readonly refusals: readonly Refusal[];
}

/** Chooses how the hosts read the image: the best way that serves all of them, or the one that is asked for. */
export function chooseForkTransport(
  request: ForkRequest,
  root: HostInventory,
  vm: VmInventory,
  joins: readonly JoinFacts[],
): ForkTransport {
  const asked = request.transport ?? 'auto';
  const obstaclesOf = (transport: Transport): Refusal[] => obstacles(transport, request, root, vm, joins);
  if (asked !== 'auto') return { transport: asked, reason: 'asked for', refusals: obstaclesOf(asked) };
  const ranked = rankedTransports();
  const lowest = ranked.at(-1) as Transport;
  let first: Refusal | undefined;
  for (const transport of ranked.slice(0, -1)) {
    const [obstacle] = obstaclesOf(transport);
    if (obstacle === undefined) {
      return { transport, reason: `all hosts reach ${root.host} by ${transportRow(transport).title}`, refusals: [] };
    }
    first ??= obstacle;
  }
  return { transport: lowest, reason: first?.reason ?? 'no faster transport is known', refusals: obstaclesOf(lowest) };
}

function obstacles(
  transport: Transport,
  { fetch, dataSecurity }: ForkRequest,
  source: HostInventory,
  vm: VmInventory,
  joins: readonly JoinFacts[],
): Refusal[] {
  const { registersMemory, title } = transportRow(transport);
  return joins.flatMap((join): Refusal[] => {
    if (join.kind === 'unreachable') return [];
    const { host, inventory: target, checks } = join;
    // While the image is captured it is read from its files and the parent, whatever the parent itself runs on.
    const facts = { source, target, checks, vm: { ...vm, image: null }, dataSecurity };
    const found = [...checkTransport(transport, 'postcopy', facts)];
    const isPaging = target.rdma.devices.every(({ isOnDemandPaging }) => isOnDemandPaging);
    if (fetch !== 'demand' || !registersMemory || isPaging) return found;
    const reason = `${title} registers all memory of the image on ${host}, so that nothing of it stays away`;
    return [...found, { code: 'TRANSPORT_UNAVAILABLE', reason, remedy: 'use --tcp, or --fetch all' }];
  });
}

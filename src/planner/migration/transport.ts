/** Chooses the transport of a migration, and checks whether a transport can carry it. Pure. */
import type { HostInventory } from '../../domain/host.js';
import { type MigrationMode, type MigrationOrder, MODE_TRAITS } from '../../domain/migration.js';
import type { Refusal } from '../../domain/refusal.js';
import { TRANSPORTS, type Transport, transportRow } from '../../domain/transport.js';
import { cloneObstacle } from './clone-preflight.js';
import type { PreflightFacts, TransportFacts } from './facts.js';
import { checkRdma } from './rdma.js';

export interface Choice {
  readonly transport: Transport;
  /** Why, for a person. */
  readonly reason: string;
}

/** Checks of a transport that the columns of the table cannot express. */
const SPECIAL_CHECKS: { readonly [T in Transport]?: (facts: TransportFacts) => Iterable<Refusal> } = {
  rdma: checkRdma,
};

/**
 * Chooses a transport. `auto` never fails: if no better one is possible it takes the lowest rank, and pre-flight
 * reports everything else.
 */
export function chooseTransport(order: MigrationOrder, { sourceHost, target, vm }: PreflightFacts): Choice {
  if (order.transport !== 'auto') return { transport: order.transport, reason: 'asked for' };
  const ranked = rankedTransports();
  const lowest = ranked.at(-1) ?? 'tcp';
  if (target.kind !== 'reachable')
    return { transport: lowest, reason: 'the target could not be asked whether it has RDMA' };
  const facts = { source: sourceHost, target: target.inventory, checks: target.checks, vm };
  let obstacle: Refusal | undefined;
  for (const transport of ranked.slice(0, -1)) {
    const [refusal] = checkTransport(transport, order.mode, facts);
    if (refusal === undefined) return { transport, reason: reachesBy(transport, facts) };
    obstacle ??= refusal;
  }
  return { transport: lowest, reason: obstacle?.reason ?? 'no faster transport is known' };
}

/** The transports that `auto` may choose, best first. */
function rankedTransports(): Transport[] {
  const rankOf = (transport: Transport): number => transportRow(transport).autoRank ?? -1;
  return TRANSPORTS.filter((transport) => rankOf(transport) >= 0).sort((a, b) => rankOf(b) - rankOf(a));
}

/** Yields why this transport cannot carry this VM's memory in this mode. Yields nothing if it can. */
export function* checkTransport(transport: Transport, mode: MigrationMode, facts: TransportFacts): Iterable<Refusal> {
  const { title, sameMachineOnly, carriesBackendMoves } = transportRow(transport);
  const { source, target, vm } = facts;
  const refuse = (reason: string): Refusal => ({ code: 'TRANSPORT_UNAVAILABLE', reason, remedy: 'use --tcp' });
  if (MODE_TRAITS[mode].mover === 'backend' && !carriesBackendMoves) {
    yield refuse(`vmigrate does not run QEMU's own migration over ${title}`);
    return;
  }
  if (sameMachineOnly && target.machineId !== source.machineId) {
    yield refuse(
      `${title} needs both daemons on one machine; ${source.host} and ${target.host} are on different machines`,
    );
    return;
  }
  const obstacle = cloneObstacle(transport, vm);
  if (obstacle !== null) {
    yield obstacle;
    return;
  }
  yield* SPECIAL_CHECKS[transport]?.(facts) ?? [];
}

function reachesBy(transport: Transport, { source, target }: TransportFacts): string {
  return `${place(source)} and ${place(target)} reach each other by ${transportRow(transport).title}`;
}

function place({ host, rdma }: HostInventory): string {
  const device = rdma.devices.find(({ ports }) =>
    ports.some(({ addresses }) => addresses.includes(rdma.address ?? '')),
  );
  return `${host} (${[device?.name, rdma.address].filter((part) => typeof part === 'string').join(', ')})`;
}

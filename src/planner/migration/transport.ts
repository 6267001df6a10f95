/** Chooses the transport of a migration, and checks whether a transport can carry it. Pure. */
import { type DataSecurity, strongest } from '../../domain/data-security.js';
import type { HostInventory } from '../../domain/host.js';
import { type MigrationMode, type MigrationOrder, MODE_TRAITS } from '../../domain/migration.js';
import type { Refusal } from '../../domain/refusal.js';
import { ALL_TRANSPORTS, type Transport, type TransportTable, transportRow } from '../../domain/transport.js';
import { cloneObstacle } from './clone-preflight.js';
import type { PreflightFacts, TransportFacts } from './facts.js';
import { checkRdma } from './rdma.js';

export interface Choice {
  readonly transport: Transport;
  /** Why, for a person. */
  readonly reason: string;
}

/** Checks of a transport that the columns of the table cannot express, and how a person finds it on a host. */
interface Special {
  readonly check: (facts: TransportFacts) => Iterable<Refusal>;
  readonly place: (host: HostInventory) => string;
}
const SPECIAL: { readonly [T in Transport]?: Special } = { rdma: { check: checkRdma, place: rdmaPlace } };

/**
 * Chooses a transport. `auto` never fails: if no better one is possible it takes the lowest rank, and pre-flight
 * reports everything else.
 */
export function chooseTransport(
  order: MigrationOrder,
  { sourceHost, target, vm }: PreflightFacts,
  table = ALL_TRANSPORTS,
): Choice {
  if (order.transport !== 'auto') return { transport: order.transport, reason: 'asked for' };
  const ranked = rankedTransports(table);
  const lowest = ranked.at(-1) as Transport;
  if (target.kind !== 'reachable')
    return { transport: lowest, reason: 'the target could not be asked whether it has RDMA' };
  const { dataSecurity } = order;
  const facts = { source: sourceHost, target: target.inventory, checks: target.checks, vm, dataSecurity };
  let obstacle: Refusal | undefined;
  for (const transport of ranked.slice(0, -1)) {
    const [refusal] = checkTransport(transport, order.mode, facts, table);
    if (refusal === undefined) return { transport, reason: reachesBy(transport, table, facts) };
    obstacle ??= refusal;
  }
  return { transport: lowest, reason: obstacle?.reason ?? 'no faster transport is known' };
}

/** The transports that `auto` may choose, best first; at least one has a rank. */
export function rankedTransports(table: TransportTable = ALL_TRANSPORTS): Transport[] {
  const rankOf = (transport: Transport): number => transportRow(transport, table).autoRank ?? -1;
  const names = Object.keys(table) as Transport[];
  return names.filter((transport) => rankOf(transport) >= 0).sort((a, b) => rankOf(b) - rankOf(a));
}

/** Yields why this transport cannot carry this VM's memory in this mode. Yields nothing if it can. */
export function* checkTransport(
  transport: Transport,
  mode: MigrationMode,
  facts: TransportFacts,
  table = ALL_TRANSPORTS,
): Iterable<Refusal> {
  const { title, sameMachineOnly, carriesBackendMoves } = transportRow(transport, table);
  const { source, target, vm, isSocketSeen } = facts;
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
  if (sameMachineOnly && isSocketSeen === false) {
    yield refuse(
      `${target.host} does not see the socket of ${source.host} under its path, because the daemons have different ` +
        'mount namespaces',
    );
    return;
  }
  const obstacle = cloneObstacle(transport, vm, table);
  if (obstacle !== null) {
    yield obstacle;
    return;
  }
  yield* checkProtection(transport, mode, facts, table);
  yield* SPECIAL[transport]?.check(facts) ?? [];
}

/**
 * What protects the memory of a move between these hosts, if this project sends it. Undefined, too, if the build of one
 * is older: it would not know the word.
 */
export function protectionOf(
  transport: Transport,
  mode: MigrationMode,
  facts: Pick<TransportFacts, 'source' | 'target' | 'dataSecurity'>,
  table = ALL_TRANSPORTS,
): DataSecurity | undefined {
  // QEMU's own stream goes by mutual TLS.
  if (MODE_TRAITS[mode].mover === 'backend') return 'encrypt';
  const isOurs = transportRow(transport, table).protectsBytes && olderOf(facts) === undefined;
  return isOurs ? demanded(facts) : undefined;
}

function demanded({
  source,
  target,
  dataSecurity = 'none',
}: Pick<TransportFacts, 'source' | 'target' | 'dataSecurity'>) {
  return strongest(source.dataSecurity ?? 'none', target.dataSecurity ?? 'none', dataSecurity);
}

function olderOf({ source, target }: Pick<TransportFacts, 'source' | 'target'>): HostInventory | undefined {
  return [source, target].find(({ dataSecurity }) => dataSecurity === undefined);
}

/**
 * What a user asks for, and encryption that a host demands, hold for each way that the pages can take. The integrity
 * that a host demands is that of its connections over tcp.
 */
function* checkProtection(
  transport: Transport,
  mode: MigrationMode,
  facts: TransportFacts,
  table: TransportTable,
): Iterable<Refusal> {
  const code = 'DATA_NOT_PROTECTED';
  const { source, target } = facts;
  const older = olderOf(facts);
  const upgrade = `install the same vmigrate on ${source.host} and ${target.host}`;
  if (MODE_TRAITS[mode].mover === 'backend') {
    if (older !== undefined)
      yield { code, reason: `${older.host} has a build that takes QEMU's own stream from anybody`, remedy: upgrade };
    return;
  }
  const needed = demanded(facts) === 'encrypt' ? 'encrypt' : (facts.dataSecurity ?? 'none');
  const { title, protectsBytes, sameMachineOnly } = transportRow(transport, table);
  if (needed === 'none' || sameMachineOnly) return;
  const [able, done, demand] =
    needed === 'encrypt'
      ? ['encrypt', 'encrypted', 'encryption is demanded']
      : ['authenticate', 'authenticated', 'integrity is demanded'];
  if (protectsBytes) {
    if (older !== undefined)
      yield { code, reason: `${older.host} has a build that cannot ${able}, and ${demand}`, remedy: upgrade };
    return;
  }
  const distrusting = [source, target].find(({ rdmaTrust }) => rdmaTrust !== 'trusted');
  if (distrusting === undefined) return;
  yield {
    code,
    reason: `${title} is not ${done}, ${demand}, and ${distrusting.host} does not trust its network`,
    remedy: 'use --tcp, or protect the network below (IPsec, MACsec) and set security.rdma to "trusted" on both hosts',
  };
}

function reachesBy(transport: Transport, table: TransportTable, { source, target }: TransportFacts): string {
  const place = SPECIAL[transport]?.place ?? (({ host }: HostInventory) => host);
  return `${place(source)} and ${place(target)} reach each other by ${transportRow(transport, table).title}`;
}

function rdmaPlace({ host, rdma }: HostInventory): string {
  const device = rdma.devices.find(({ ports }) =>
    ports.some(({ addresses }) => addresses.includes(rdma.address ?? '')),
  );
  return `${host} (${[device?.name, rdma.address].filter((part) => typeof part === 'string').join(', ')})`;
}

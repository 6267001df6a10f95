/** Which transport a migration takes, and why. Pure. */
import type { HostInventory } from '../../domain/host.js';
import type { MigrationOrder } from '../../domain/migration.js';
import type { Transport } from '../../domain/transport.js';
import type { PreflightFacts } from './preflight.js';
import { checkRdma } from './rdma.js';

export interface Choice {
  readonly transport: Transport;
  /** For a person. */
  readonly reason: string;
}

/** `auto` never fails: where RDMA cannot be had it is tcp, and pre-flight says what else is wrong. */
export function chooseTransport(order: MigrationOrder, { sourceHost, target, vm }: PreflightFacts): Choice {
  if (order.transport !== 'auto') return { transport: order.transport, reason: 'asked for' };
  if (target.kind !== 'reachable') return { transport: 'tcp', reason: 'the target could not be asked for RDMA' };
  const facts = { source: sourceHost, target: target.inventory, checks: target.checks, vm };
  const [obstacle] = checkRdma(order.mode, facts);
  return obstacle === undefined
    ? { transport: 'rdma', reason: `${place(sourceHost)} and ${place(target.inventory)} reach each other by RDMA` }
    : { transport: 'tcp', reason: obstacle.reason };
}

function place({ host, rdma }: HostInventory): string {
  const device = rdma.devices.find(({ ports }) =>
    ports.some(({ addresses }) => addresses.includes(rdma.address ?? '')),
  );
  return `${host} (${[device?.name, rdma.address].filter((part) => typeof part === 'string').join(', ')})`;
}

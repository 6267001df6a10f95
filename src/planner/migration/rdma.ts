/** What stands in the way of RDMA between two hosts, for one VM. Pure, as all of pre-flight. */
import type { HostInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import type { TransportFacts } from './facts.js';

const MIB = 1024 * 1024;
const USE_TCP = 'use --tcp';

export function* checkRdma({ source, target, checks, vm }: TransportFacts): Iterable<Refusal> {
  for (const { host, rdma } of [source, target]) {
    if (rdma.problem !== null) yield unavailable(`no RDMA on ${host}: ${rdma.problem.reason}`, rdma.problem.remedy);
  }
  if (source.rdma.problem === null && target.rdma.problem === null && checks.rdma?.isReached !== true) {
    const why = checks.rdma?.reason === undefined ? '' : `: ${checks.rdma.reason}`;
    yield unavailable(
      `${target.host} does not reach ${source.host} by RDMA at ${source.rdma.address ?? 'no address'}${why}`,
      `check that both RDMA ports are on one network (rping -s there, rping -c -a ADDRESS here), or ${USE_TCP}`,
    );
  }
  for (const device of vm.discardingDevices) {
    yield unavailable(
      `${vm.spec.name} can give memory back while it runs (${device}), behind the back of an RDMA device that has it registered`,
      `${USE_TCP}, or run the VM without the device`,
    );
  }
  yield* checkLimits({ source, target, checks, vm });
}

/**
 * Registering puts a page behind each byte of the VM's memory, and locks it, unless the device can do with what is
 * there.
 */
function* checkLimits({ source, target, vm }: TransportFacts): Iterable<Refusal> {
  const { sizeBytes } = vm.spec.memory;
  const missingBytes = Math.max(0, sizeBytes - vm.ramAllocatedBytes);
  for (const [inventory, allocatedBytes] of [
    [source, missingBytes],
    [target, sizeBytes],
  ] as const) {
    const { host, rdma } = inventory;
    if (usesOnDemandPaging(inventory)) continue;
    yield* short(host, 'may be locked by vmigrated (memlock)', sizeBytes, rdma.lockableBytes, [
      `raise its limit to ${mib(sizeBytes)} or more (LimitMEMLOCK=infinity in its unit)`,
      'or run it as root or with CAP_IPC_LOCK',
    ]);
    yield* short(host, 'fits into the memory cgroup of vmigrated', allocatedBytes, rdma.cgroupFreeBytes, [
      'raise its limit (memory.max)',
    ]);
  }
  // The target's room is looked at for every transport.
  if (usesOnDemandPaging(source) || vm.spec.memory.pageBytes > 4096) return;
  const availableBytes = Math.min(source.memoryAvailableBytes, source.ramFileFreeBytes);
  if (!(availableBytes >= missingBytes)) {
    yield {
      code: 'SOURCE_MEMORY',
      reason: `RDMA needs a page behind each byte of ${vm.spec.name}, ${mib(missingBytes)} more than there are; ${source.host} has ${mib(availableBytes)}`,
      remedy: `free memory on ${source.host}, or ${USE_TCP}`,
    };
  }
}

function* short(
  host: string,
  what: string,
  neededBytes: number,
  availableBytes: number | null,
  remedies: readonly string[],
): Iterable<Refusal> {
  if (availableBytes === null || availableBytes >= neededBytes) return;
  yield {
    code: 'RDMA_LIMIT',
    reason: `RDMA needs ${mib(neededBytes)}; on ${host} ${mib(availableBytes)} ${what}: ${mib(neededBytes - availableBytes)} are missing`,
    remedy: `${remedies.join(', ')}, or ${USE_TCP}`,
  };
}

function usesOnDemandPaging({ rdma }: HostInventory): boolean {
  const { address } = rdma;
  const device = rdma.devices.find(({ ports }) => ports.some(({ addresses }) => addresses.includes(address ?? '')));
  return device?.isOnDemandPaging === true;
}

function unavailable(reason: string, remedy: string): Refusal {
  return { code: 'TRANSPORT_UNAVAILABLE', reason, remedy };
}

function mib(bytes: number): string {
  return Number.isFinite(bytes) ? `${Math.ceil(bytes / MIB)} MiB` : 'nothing';
}

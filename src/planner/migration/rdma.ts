/** Checks whether RDMA can carry the memory of one VM between two hosts. Pure, like all of pre-flight. */
import type { HostInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import { availableMib, neededMib } from '../bytes.js';
import type { TransportFacts } from './facts.js';

const USE_TCP = 'use --tcp';

export function* checkRdma({ source, target, checks, vm }: TransportFacts): Iterable<Refusal> {
  for (const { host, rdma } of [source, target]) {
    if (rdma.problem !== null)
      yield unavailable(`${host} cannot use RDMA: ${rdma.problem.reason}`, rdma.problem.remedy);
  }
  if (source.rdma.problem === null && target.rdma.problem === null && checks.rdma?.isReached !== true) {
    const why = checks.rdma?.reason === undefined ? '' : `: ${checks.rdma.reason}`;
    yield unavailable(
      `${target.host} cannot reach ${source.host} by RDMA at ${source.rdma.address ?? 'no address'}${why}`,
      `check that both RDMA ports are on one network (rping -s there, rping -c -a ADDRESS here), or ${USE_TCP}`,
    );
  }
  for (const device of vm.discardingDevices) {
    yield unavailable(
      `${vm.spec.name} can free memory while it runs (${device}), but an RDMA device needs registered memory to stay`,
      `${USE_TCP}, or run the VM without the device`,
    );
  }
  yield* checkLimits({ source, target, checks, vm });
}

/** Registration allocates all of the VM's memory and locks it, unless the device supports on-demand paging. */
function* checkLimits({ source, target, vm }: TransportFacts): Iterable<Refusal> {
  const { sizeBytes } = vm.spec.memory;
  const missingBytes = Math.max(0, sizeBytes - vm.ramAllocatedBytes);
  for (const [inventory, allocatedBytes] of [
    [source, missingBytes],
    [target, sizeBytes],
  ] as const) {
    const { host, rdma } = inventory;
    if (usesOnDemandPaging(inventory)) continue;
    yield* checkLimit(host, 'the memlock limit of vmigrated', sizeBytes, rdma.lockableBytes, [
      `raise the limit to ${neededMib(sizeBytes)} or more (LimitMEMLOCK=infinity in the unit)`,
      'run vmigrated as root or with CAP_IPC_LOCK',
    ]);
    yield* checkLimit(host, 'the memory cgroup of vmigrated', allocatedBytes, rdma.cgroupFreeBytes, [
      'raise the limit of the cgroup (memory.max)',
    ]);
  }
  // checkMemory checks the target's memory for every transport.
  if (usesOnDemandPaging(source) || vm.spec.memory.pageBytes > 4096) return;
  const availableBytes = Math.min(source.memoryAvailableBytes, source.ramFileFreeBytes);
  if (!(availableBytes >= missingBytes)) {
    const needed = `RDMA needs all memory of ${vm.spec.name} allocated, ${neededMib(missingBytes)} more than now`;
    yield {
      code: 'SOURCE_MEMORY',
      reason: `${needed}; ${source.host} has ${neededMib(availableBytes)}`,
      remedy: `free memory on ${source.host}, or ${USE_TCP}`,
    };
  }
}

function* checkLimit(
  host: string,
  limit: string,
  neededBytes: number,
  availableBytes: number | null,
  remedies: readonly string[],
): Iterable<Refusal> {
  if (availableBytes === null || availableBytes >= neededBytes) return;
  const [needed, allowed] = [neededMib(neededBytes), availableMib(availableBytes)];
  const missing = neededMib(neededBytes - availableBytes);
  yield {
    code: 'RDMA_LIMIT',
    reason: `RDMA needs ${needed}; ${limit} on ${host} allows ${allowed}, ${missing} too little`,
    remedy: [...remedies, `or ${USE_TCP}`].join(', '),
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

/** Clones that are to leave their host: the refusals that only clones can get. */
import { describe, expect, test } from 'vitest';
import type { HostInventory, VmInventory } from '../../../src/domain/host.js';
import type { MigrationOrder, MigrationRequest } from '../../../src/domain/migration.js';
import type { RefusalCode } from '../../../src/domain/refusal.js';
import type { VmSpec } from '../../../src/domain/vm.js';
import { planMigration } from '../../../src/planner/migration/plan.js';
import { preflight } from '../../../src/planner/migration/preflight.js';
import { goodFacts, request, spec, vm } from './planner-facts.js';

const MIB = 1024 * 1024;
const memory = { ...spec.memory, backing: 'image' as const };
const image = { id: '0011223344556677', isComplete: true, ownBytes: 100 * MIB };

interface Change {
  readonly request?: Partial<MigrationRequest>;
  readonly source?: Partial<HostInventory>;
  readonly target?: Partial<HostInventory>;
  readonly vm?: Partial<VmInventory>;
  readonly spec?: Partial<VmSpec>;
}

function factsOf(change: Change) {
  const { sourceHost, target } = goodFacts();
  return {
    sourceHost: { ...sourceHost, ...change.source },
    target: { ...target, inventory: { ...target.inventory, ...change.target } },
    // The request is for QEMU's own move. QEMU cannot tell that the memory is not a shared file.
    vm: {
      ...{ ...vm, isRamShared: false, isRamNamedFile: false, image, ...change.vm },
      spec: { ...spec, memory, ...change.spec },
    },
  };
}

const refusals = (change: Change) => preflight({ ...request, ...change.request }, factsOf(change));

const CASES: readonly [what: string, change: Change, code: RefusalCode, names: RegExp][] = [
  [
    'an identity that is not complete',
    { vm: { identityIssue: 'its guest has not given the NIC up' } },
    'IDENTITY_PENDING',
    /vm1 does not have its own identity yet: its guest has not/,
  ],
  [
    'the same of a clone with memory of its own, moved by QEMU',
    { request: { mode: 'native-precopy' }, vm: { image: null, identityIssue: 'no agent' } },
    'IDENTITY_PENDING',
    /no agent/,
  ],
  ['a disk that ends with it', { vm: { fleetingDisks: ['vda'] } }, 'DISK_NOT_MOVABLE', /vda of vm1 .* deleted .* on A/],
  [
    'a disk that another host serves',
    {
      vm: { fleetingDisks: ['d0'] },
      spec: { disks: spec.disks.map((disk) => ({ ...disk, served: { host: 'C', image: image.id } })) },
    },
    'DISK_NOT_MOVABLE',
    /vm1 reads disk d0 from C, which serves it to A only/,
  ],
  [
    'such a disk under QEMU',
    { request: { mode: 'native-postcopy' }, vm: { fleetingDisks: ['vda'] } },
    'DISK_NOT_MOVABLE',
    /vda/,
  ],
  ['an image that still fills', { vm: { image: { ...image, isComplete: false } } }, 'IMAGE_INCOMPLETE', /image 0011/],
  [
    'memory of its own that still fills',
    { spec: { memory: { ...memory, backing: 'shared' } } },
    'VM_FILLING',
    /pages of vm1 are still being copied/,
  ],
  ['no preload', { spec: { hasPreload: false } }, 'RAM_NOT_SHARED', /vm1 runs without the preload/],
  ['little memory at the source', { source: { memoryAvailableBytes: 90 * MIB } }, 'SOURCE_MEMORY', /100 MiB; A has 90/],
  ['a full tmpfs at the source', { source: { ramFileFreeBytes: 10 * MIB } }, 'SOURCE_MEMORY', /100 MiB; A has 10/],
  ['no figure', { vm: { image: { ...image, ownBytes: Number.NaN } } }, 'SOURCE_MEMORY', /up to nothing/],
  [
    'fetching ahead',
    { request: { mode: 'hybrid' } },
    'RAM_NOT_SHARED',
    /vm1 runs on image 0011.*: what it writes is in no file/,
  ],
  [
    'a neighbour',
    { request: { transport: 'shm' }, target: { machineId: 'machine-of-A' } },
    'TRANSPORT_UNAVAILABLE',
    /shm cannot serve the memory of vm1: the pages that a clone has written/,
  ],
  [
    'an RDMA device',
    { request: { transport: 'rdma' } },
    'TRANSPORT_UNAVAILABLE',
    /RDMA cannot serve the memory of vm1/,
  ],
  ['a small tmpfs at the target', { target: { ramFileFreeBytes: MIB } }, 'TARGET_MEMORY', /needs 512 MiB/],
];

describe('a clone that is to move', () => {
  test.each(CASES)('is refused for %s', (_, change, code, names) => {
    const found = refusals(change);
    expect(found.map((refusal) => refusal.code)).toEqual([code]);
    expect(found[0]?.reason).toMatch(names);
    expect(found[0]?.remedy).not.toBe('');
  });

  test('has nothing in its way over tcp, nor under QEMU', () => {
    expect(refusals({})).toEqual([]);
    const incomplete = { image: { ...image, isComplete: false } };
    expect(refusals({ request: { mode: 'native-precopy' }, vm: incomplete })).toEqual([]);
  });

  test('takes tcp where any transport may do, and says why', () => {
    const order: MigrationOrder = { ...request, transport: 'auto' };
    const { plan } = planMigration(order, factsOf({}));
    expect(plan?.request.transport).toBe('tcp');
    expect(plan?.transportReason).toMatch(/RDMA cannot serve the memory of vm1/);
  });
});

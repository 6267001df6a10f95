import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { HostInventory, HostLimits, TargetChecks, VmInventory } from '../../../src/domain/host.js';
import type { MigrationRequest } from '../../../src/domain/migration.js';
import type { MigrationRefusalCode } from '../../../src/domain/refusal.js';
import type { FileView } from '../../../src/domain/storage.js';
import type { RdmaInventory } from '../../../src/domain/transport.js';
import type { VmSpec } from '../../../src/domain/vm.js';
import type { StorageFacts, TargetFacts } from '../../../src/planner/migration/facts.js';
import { preflight } from '../../../src/planner/migration/preflight.js';
import { goodFacts, MIGRATION_REFUSAL_CODES, NO_RDMA, rdma, request, spec, vm } from './planner-facts.js';
import { expectMigrationRemedyWorks } from './remedies.js';

interface Change {
  request?: Partial<MigrationRequest>;
  source?: Partial<HostInventory>;
  target?: Partial<HostInventory>;
  checks?: Partial<TargetChecks>;
  vm?: Partial<VmInventory>;
  spec?: Partial<VmSpec>;
  facts?: TargetFacts;
  storage?: StorageFacts;
  isSocketSeen?: boolean;
}

function refusals(change: Change) {
  const good = goodFacts();
  const target: TargetFacts = change.facts ?? {
    kind: 'reachable',
    inventory: { ...good.target.inventory, ...change.target },
    checks: { ...good.target.checks, ...change.checks },
    storage: change.storage ?? good.target.storage,
    ...(change.isSocketSeen === undefined ? {} : { isSocketSeen: change.isSocketSeen }),
  };
  return preflight(
    { ...request, ...change.request },
    {
      sourceHost: { ...good.sourceHost, ...change.source },
      target,
      vm: { ...vm, ...change.vm, spec: { ...spec, ...change.spec } },
    },
  );
}

const MIB = 1024 * 1024;
const hugeMemory = { ...spec.memory, pageBytes: 2 * MIB };

/** One file with these views of it. */
function compared(isWritable: boolean, source: Partial<FileView>, target: Partial<FileView>): StorageFacts {
  const path = '/disks/d0.qcow2';
  const view: FileView = {
    ...{ path, problem: null, kind: 'file', sizeBytes: 1, realName: 'd0.qcow2', isMountPoint: false, inode: '1:1' },
    ...{ deviceId: null, marker: null, markerProblem: null, digest: null, isSampled: false, chain: [] },
  };
  const file = { path, use: 'disk d0', isWritable, format: null };
  return { kind: 'compared', files: [{ file, source: { ...view, ...source }, target: { ...view, ...target } }] };
}
const limits: HostLimits = {
  ...{ openFiles: { used: 40, max: 20_000 }, openFilesOfHost: null, tasks: { used: 300, max: 30_000 } },
  ...{ mappings: null, fileWatchesMax: null },
};

/** One line for each refusal: the changed fact, the code, and the text that the reason must contain. */
const CASES: readonly [what: string, change: Change, code: MigrationRefusalCode, names: RegExp][] = [
  [
    'a target without descriptors',
    { target: { limits: { ...limits, openFiles: { used: 1000, max: 1024 } } } },
    'HOST_LIMIT',
    /^B: open files of vmigrated are limited to 1024, 1000 are in use, and about 44 more are needed/,
  ],
  [
    'a source without descriptors',
    { source: { limits: { ...limits, openFiles: { used: 1000, max: 1024 } } } },
    'HOST_LIMIT',
    /^A: open files of vmigrated/,
  ],
  [
    'a target that may start no threads',
    { target: { limits: { ...limits, tasks: { used: 99, max: 100 } } } },
    'HOST_LIMIT',
    /^B: processes and threads are limited to 100/,
  ],
  [
    'the source itself',
    { request: { target: 'A' }, facts: { kind: 'isSource' } },
    'TARGET_IS_SOURCE',
    /vm1 is already on A/,
  ],
  [
    'a silent target',
    { facts: { kind: 'unreachable', error: new MigrationError('UNREACHABLE', 'connection refused') } },
    'TARGET_UNREACHABLE',
    /B does not answer: connection refused/,
  ],
  ['little memory', { target: { memoryAvailableBytes: 600 * MIB } }, 'TARGET_MEMORY', /needs 640 MiB.*B has 600 MiB/],
  [
    'a full state directory there',
    { target: { stateFreeBytes: 7 * MIB } },
    'NO_SPACE',
    /directory of B needs 8 MiB.*has 7 MiB/,
  ],
  ['a full state directory here', { source: { stateFreeBytes: 0 } }, 'NO_SPACE', /directory of A/],
  ['a small tmpfs', { target: { ramFileFreeBytes: 100 * MIB } }, 'TARGET_MEMORY', /needs 512 MiB.*B has 100 MiB/],
  ['no figure', { target: { memoryAvailableBytes: Number.NaN } }, 'TARGET_MEMORY', /B has nothing/],
  ['no huge pages', { spec: { memory: hugeMemory } }, 'TARGET_HUGE_PAGES', /needs 256 .* of 2 MiB; B has 0/],
  ['no userfaultfd', { target: { isUserfaultfdPermitted: false } }, 'USERFAULTFD_NOT_PERMITTED', /kernel of B/],
  [
    'a pre-copy without userfaultfd',
    { request: { mode: 'precopy' }, target: { isUserfaultfdPermitted: false } },
    'USERFAULTFD_NOT_PERMITTED',
    /kernel of B/,
  ],
  ['an old kernel', { target: { hasMinorFaults: false } }, 'USERFAULTFD_NOT_PERMITTED', /minor faults/],
  [
    'an identity that is pending',
    { vm: { identityIssue: 'no agent' } },
    'IDENTITY_PENDING',
    /vm1 does not have its own identity yet: no agent/,
  ],
  ['a disk that ends here', { vm: { fleetingDisks: ['vda'] } }, 'DISK_NOT_MOVABLE', /vda of vm1 .* deleted .* on A/],
  ['private RAM', { vm: { isRamShared: false, isRamNamedFile: false } }, 'RAM_NOT_SHARED', /RAM of vm1 is private/],
  ['a memfd', { vm: { isRamNamedFile: false } }, 'RAM_NOT_NAMED_FILE', /not a named file/],
  ['no preload', { target: { isPreloadPresent: false } }, 'PRELOAD_MISSING', /B lacks the preload/],
  ['no such machine', { target: { machines: ['pc-q35-8.0'] } }, 'MACHINE_MISSING', /pc-q35-7\.2/],
  ['QEMU 7.1', { target: { qemuVersion: '7.1.0' } }, 'QEMU_TOO_OLD', /oldest supported version is 7\.2/],
  ['an older QEMU', { vm: { qemuVersion: '8.0.2' } }, 'QEMU_TOO_OLD', /7\.2\.22.*runs in QEMU 8\.0\.2/],
  ['no QEMU', { target: { qemuVersion: null } }, 'QEMU_TOO_OLD', /B has no QEMU/],
  ['a QEMU without a version', { target: { qemuVersion: 'yes' } }, 'QEMU_TOO_OLD', /"yes"/],
  ['no KVM', { vm: { accel: 'kvm' } }, 'ACCEL_MISSING', /under KVM, which B cannot use/],
  ['no disk', { checks: { disks: [] } }, 'DISK_MISSING', /cannot open the disk d0 .*\/disks\/d0\.qcow2/],
  [
    'a disk it may not write',
    { checks: { disks: [{ path: '/disks/d0.qcow2', isReadable: true, isWritable: false, reason: 'EROFS' }] } },
    'DISK_MISSING',
    /cannot write the disk d0 .*EROFS/,
  ],
  ['no initrd', { checks: { files: [{ path: '/boot/vmlinuz', isReadable: true }] } }, 'FILE_MISSING', /\/boot\/initrd/],
  ['no bridge', { target: { bridges: ['br1'] } }, 'BRIDGE_MISSING', /n0 .* br0/],
  ['a passed-through device', { vm: { migrationBlockers: ['vfio-pci'] } }, 'DEVICE_NOT_MIGRATABLE', /vfio-pci/],
  ['a VM in a job', { vm: { job: 'job-1' } }, 'VM_IN_JOB', /job-1/],
  ['a paused VM', { vm: { state: 'paused' } }, 'VM_NOT_RUNNING', /vm1 is paused/],
  ["another host's VM", { vm: { owner: 'C' } }, 'VM_NOT_OWNED', /belongs to C/],
  ['a taken name', { target: { vmNames: ['vm1'] } }, 'NAME_TAKEN', /B already has a VM named vm1/],
  ['an old certificate', { target: { certificateExpiresAt: '2020-01-01T00:00:00Z' } }, 'CERTIFICATE_EXPIRED', /of B/],
  ['an unreadable date', { source: { certificateExpiresAt: 'soon' } }, 'CERTIFICATE_EXPIRED', /of A .*soon/],
  ['a wrong clock', { target: { clockMs: 1_700_000_600_000 } }, 'CLOCK_SKEW', /differ by 600 s, at most 300 s/],
  [
    'rdma without a device',
    { request: { transport: 'rdma' }, target: { rdma: NO_RDMA } },
    'TRANSPORT_UNAVAILABLE',
    /B cannot use RDMA: it has no RDMA device/,
  ],
  [
    'rdma that does not get there',
    { request: { transport: 'rdma' }, checks: { rdma: { isReached: false, reason: 'EHOSTUNREACH' } } },
    'TRANSPORT_UNAVAILABLE',
    /B cannot reach A by RDMA at 10\.0\.1\.1: EHOSTUNREACH/,
  ],
  [
    'rdma that nobody has tried',
    { request: { transport: 'rdma' }, checks: { rdma: null } },
    'TRANSPORT_UNAVAILABLE',
    /B cannot reach A/,
  ],
  [
    'rdma under a balloon',
    { request: { transport: 'rdma' }, vm: { discardingDevices: ['virtio-balloon-pci'] } },
    'TRANSPORT_UNAVAILABLE',
    /vm1 can free memory while it runs \(virtio-balloon-pci\)/,
  ],
  [
    'native migration over rdma',
    { request: { mode: 'native-postcopy', transport: 'rdma' } },
    'TRANSPORT_UNAVAILABLE',
    /does not run QEMU's own migration over RDMA/,
  ],
  [
    'little that may be locked',
    { request: { transport: 'rdma' }, target: { rdma: { ...rdma('10.0.1.2'), lockableBytes: 8 * MIB } } },
    'RDMA_LIMIT',
    /needs 512 MiB; the memlock limit of vmigrated on B allows 8 MiB, 504 MiB too little/,
  ],
  [
    'a narrow cgroup at the source',
    { request: { transport: 'rdma' }, source: { rdma: { ...rdma('10.0.1.1'), cgroupFreeBytes: 100 * MIB } } },
    'RDMA_LIMIT',
    /needs 384 MiB; the memory cgroup of vmigrated on A allows 100 MiB, 284 MiB too little/,
  ],
  [
    'no room at the source for what the VM has never touched',
    { request: { transport: 'rdma' }, source: { memoryAvailableBytes: 300 * MIB } },
    'SOURCE_MEMORY',
    /384 MiB more than now; A has 300 MiB/,
  ],
  [
    'shm between machines',
    { request: { transport: 'shm' } },
    'TRANSPORT_UNAVAILABLE',
    /A and B are on different machines/,
  ],
  [
    'shm between mount namespaces',
    { request: { transport: 'shm' }, target: { machineId: 'machine-of-A' }, isSocketSeen: false },
    'TRANSPORT_UNAVAILABLE',
    /B does not see the socket of A under its path, .* different mount namespaces/,
  ],
  [
    'a device that somebody has added',
    { vm: { deviceChanges: ['device p was added'] } },
    'DEVICE_CHANGED',
    /p was added/,
  ],
  [
    'a disk that is not shared',
    { storage: compared(true, { marker: 'a' }, { marker: 'b' }) },
    'DISK_NOT_SHARED',
    /B does not see what A has just written/,
  ],
  ['another kernel', { storage: compared(false, { digest: 'a' }, { digest: 'b' }) }, 'FILE_DIFFERS', /content of/],
  [
    'a target that cannot compare',
    { storage: { kind: 'unsupported' } },
    'STORAGE_NOT_PROVEN',
    /B has an older vmigrate/,
  ],
  [
    'what the policy of the target forbids',
    { checks: { files: [], forbidden: [{ what: 'kernel', value: '/boot/vmlinuz', key: 'paths' }] } },
    'POLICY_FORBIDS',
    /the policy of B does not allow what .* names: kernel "\/boot\/vmlinuz"/,
  ],
  [
    'a disk that the policy of the target forbids',
    {
      checks: {
        disks: [
          {
            ...{ path: '/disks/d0.qcow2', isReadable: false, isWritable: false },
            forbidden: [{ what: 'disk d0', value: '/disks/d0.qcow2', key: 'paths' }],
          },
        ],
      },
    },
    'POLICY_FORBIDS',
    /disk d0 "\/disks\/d0.qcow2"/,
  ],
  [
    'rdma where encryption is demanded',
    {
      request: { transport: 'rdma', dataSecurity: 'encrypt' },
      source: { dataSecurity: 'integrity' },
      target: { dataSecurity: 'integrity' },
    },
    'DATA_NOT_PROTECTED',
    /RDMA is not encrypted.*A does not trust/,
  ],
  [
    'verified memory of a host that cannot say what has arrived',
    { request: { verifyMemory: true }, source: { canVerifyMemory: true } },
    'MEMORY_NOT_VERIFIABLE',
    /^B has a build that cannot verify memory/,
  ],
  [
    'verified memory where QEMU moves it',
    {
      request: { verifyMemory: true, mode: 'native-precopy' },
      source: { canVerifyMemory: true },
      target: { canVerifyMemory: true },
    },
    'MEMORY_NOT_VERIFIABLE',
    /QEMU moves its pages by itself/,
  ],
  [
    'fetching ahead from a kernel that does not note writes',
    { request: { mode: 'hybrid' }, source: { canTrackWrites: false } },
    'WRITE_PROTECT_MISSING',
    /^the kernel of A cannot note/,
  ],
  [
    'less downtime than the switchover takes',
    { request: { mode: 'precopy', downtimeMsMax: 31 } },
    'DOWNTIME_TOO_SHORT',
    /may stand still for 31 ms, and the switchover alone may take 3\d ms$/,
  ],
  ['another protocol', { target: { protocolVersion: 2 } }, 'PROTOCOL_VERSION', /protocol versions differ: A 1, B 2/],
];

describe('pre-flight', () => {
  test('takes an older protocol where one of the hosts was told to', () => {
    const codes = (target: object, source: object = {}) => refusals({ target, source }).map(({ code }) => code);
    const told = { protocolVersion: 1, newestProtocolVersion: 3 };
    expect(codes(told)).toEqual([]);
    expect(codes({}, told)).toEqual([]);
    expect(codes({ protocolVersion: 3 }, told)).toEqual([]);
    expect(codes({ protocolVersion: 2 }, told)).toEqual(['PROTOCOL_VERSION']);
  });

  test('finds nothing where nothing is', () => {
    expect(refusals({})).toEqual([]);
  });

  test.each(CASES)('refuses %s', (_what, change, code, names) => {
    const found = refusals(change);
    expect(found.map((refusal) => refusal.code)).toEqual([code]);
    expect(found[0]?.reason).toMatch(names);
    expect(found[0]?.remedy).not.toBe('');
    const again = (to: Partial<MigrationRequest>) => refusals({ ...change, request: { ...change.request, ...to } });
    expectMigrationRemedyWorks(found[0]!, again);
  });

  test('the cases name every code there is', () => {
    expect(new Set(CASES.map(([, , code]) => code))).toEqual(new Set(Object.keys(MIGRATION_REFUSAL_CODES)));
  });

  test('gives all reasons at once', () => {
    const found = refusals({
      vm: { job: 'job-1', accel: 'kvm' },
      target: { isPreloadPresent: false, memoryAvailableBytes: 0 },
    });
    expect(found.map(({ code }) => code).sort()).toEqual([
      'ACCEL_MISSING',
      'PRELOAD_MISSING',
      'TARGET_MEMORY',
      'VM_IN_JOB',
    ]);
  });

  test('what only our own post-copy needs does not stand in the way of --native', () => {
    const change: Change = {
      request: { mode: 'native-precopy' },
      vm: { isRamShared: false, isRamNamedFile: false },
      spec: { memory: { ...spec.memory, backing: 'private' } },
      target: { isPreloadPresent: false, isUserfaultfdPermitted: false, hasMinorFaults: false, ramFileFreeBytes: 0 },
    };
    expect(refusals(change)).toEqual([]);
  });

  test('--native has no shm', () => {
    const found = refusals({
      request: { mode: 'native-precopy', transport: 'shm' },
      target: { machineId: 'machine-of-A' },
    });
    expect(found.map(({ code }) => code)).toEqual(['TRANSPORT_UNAVAILABLE']);
  });

  test('shm between two daemons of one machine is fine, and so is a newer QEMU and a read-only disk', () => {
    const disks = [{ id: 'd0', path: '/disks/d0.qcow2', format: 'qcow2' as const, isReadOnly: true }];
    const change: Change = {
      request: { transport: 'shm' },
      target: { machineId: 'machine-of-A', qemuVersion: '10.0.2' },
      spec: { disks },
      checks: { disks: [{ path: '/disks/d0.qcow2', isReadable: true, isWritable: false }] },
    };
    expect(refusals(change)).toEqual([]);
  });

  test('rdma between two hosts that have it is fine, and with on-demand paging nothing is locked', () => {
    expect(refusals({ request: { transport: 'rdma' } })).toEqual([]);
    const paging = (address: string): RdmaInventory => {
      const found = rdma(address);
      const devices = found.devices.map((device) => ({ ...device, isOnDemandPaging: true }));
      return { ...found, devices, lockableBytes: 0, cgroupFreeBytes: 0 };
    };
    const change: Change = {
      request: { transport: 'rdma' },
      source: { rdma: paging('10.0.1.1'), memoryAvailableBytes: 0 },
      target: { rdma: paging('10.0.1.2') },
    };
    expect(refusals(change)).toEqual([]);
  });
});

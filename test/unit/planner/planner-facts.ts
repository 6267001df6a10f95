import type { HostInventory, VmInventory } from '../../../src/domain/host.js';
import type { MigrationRequest } from '../../../src/domain/migration.js';
import type { MigrationRefusalCode } from '../../../src/domain/refusal.js';
import type { RdmaInventory } from '../../../src/domain/transport.js';
import type { VmSpec } from '../../../src/domain/vm.js';
import type { PreflightFacts } from '../../../src/planner/migration/facts.js';

const MIB = 1024 * 1024;

export const spec: VmSpec = {
  name: 'vm1',
  uuid: '9d3c1f1e-0000-4000-8000-000000000001',
  machine: 'pc-q35-7.2',
  accel: 'auto',
  cpuModel: 'qemu64',
  cpus: 1,
  memory: {
    sizeBytes: 512 * MIB,
    pageBytes: 4096,
    regions: [{ id: 'ram0', lengthBytes: 512 * MIB }],
    backing: 'shared',
  },
  kernel: '/boot/vmlinuz',
  initrd: '/boot/initrd',
  disks: [{ id: 'd0', path: '/disks/d0.qcow2', format: 'qcow2', isReadOnly: false }],
  nics: [{ id: 'n0', type: 'tap', bridge: 'br0', mac: '52:54:00:00:00:01', model: 'virtio-net-pci' }],
  hasSerial: true,
  devices: [],
  qemuArgs: [],
  hasPreload: true,
};

export const request: MigrationRequest = {
  vm: 'vm1',
  target: 'B',
  mode: 'postcopy',
  transport: 'tcp',
  bandwidthBytesPerS: 0,
  downtimeMsMax: 300,
};

export const NO_RDMA: RdmaInventory = {
  problem: { reason: 'it has no RDMA device', remedy: 'use --tcp' },
  devices: [],
  address: null,
  port: null,
  lockableBytes: null,
  cgroupFreeBytes: null,
};

export function rdma(address: string): RdmaInventory {
  const port = { number: 1, isActive: true, state: 'active', linkLayer: 'Ethernet', mtuBytes: 4096 };
  const gids = [`::ffff:${address}`];
  return {
    problem: null,
    devices: [{ name: 'mlx5_0', isOnDemandPaging: false, ports: [{ ...port, gids, addresses: [address] }] }],
    address,
    port: 7401,
    lockableBytes: null,
    cgroupFreeBytes: null,
  };
}

export function host(name: string): HostInventory {
  return {
    host: name,
    machineId: `machine-of-${name}`,
    protocolVersion: 1,
    dataSecurity: 'integrity',
    canFetchAhead: true,
    canTrackWrites: true,
    qemuVersion: '7.2.22 (Debian 1:7.2+dfsg-7)',
    machines: ['pc-q35-7.2', 'pc-i440fx-7.2'],
    isKvmUsable: false,
    isUserfaultfdPermitted: true,
    hasMinorFaults: true,
    isPreloadPresent: true,
    memoryAvailableBytes: 4096 * MIB,
    ramFileFreeBytes: 4096 * MIB,
    hugePagesFree: { '2097152': 0 },
    dataAddress: '10.0.0.1',
    rdma: rdma(name === 'A' ? '10.0.1.1' : '10.0.1.2'),
    vmNames: [],
    bridges: ['br0'],
    certificateExpiresAt: '2030-01-01T00:00:00Z',
    clockMs: 1_700_000_000_000,
  };
}

export const vm: VmInventory = {
  spec,
  state: 'running',
  epoch: 3,
  owner: 'A',
  job: null,
  qemuVersion: '7.2.22',
  accel: 'tcg',
  isRamShared: true,
  isRamNamedFile: true,
  migrationBlockers: [],
  ramAllocatedBytes: 128 * MIB,
  discardingDevices: [],
  image: null,
  identityIssue: null,
  fleetingDisks: [],
  exitCode: null,
};

/** Facts with which `request` is accepted. */
export function goodFacts(): PreflightFacts & { target: { kind: 'reachable' } } {
  return {
    sourceHost: host('A'),
    target: {
      kind: 'reachable',
      inventory: host('B'),
      checks: {
        disks: [{ path: '/disks/d0.qcow2', isReadable: true, isWritable: true }],
        files: [
          { path: '/boot/vmlinuz', isReadable: true },
          { path: '/boot/initrd', isReadable: true },
        ],
        rdma: { isReached: true },
      },
      storage: { kind: 'compared', files: [] },
    },
    vm,
  };
}

/** Each code with which pre-flight may refuse a migration. A new one that is missing here does not compile. */
export const MIGRATION_REFUSAL_CODES: Readonly<Record<MigrationRefusalCode, true>> = {
  TARGET_IS_SOURCE: true,
  TARGET_UNREACHABLE: true,
  TARGET_MEMORY: true,
  NO_SPACE: true,
  TARGET_HUGE_PAGES: true,
  USERFAULTFD_NOT_PERMITTED: true,
  RAM_NOT_SHARED: true,
  RAM_NOT_NAMED_FILE: true,
  PRELOAD_MISSING: true,
  MACHINE_MISSING: true,
  QEMU_TOO_OLD: true,
  ACCEL_MISSING: true,
  DISK_MISSING: true,
  FILE_MISSING: true,
  BRIDGE_MISSING: true,
  DEVICE_NOT_MIGRATABLE: true,
  VM_IN_JOB: true,
  VM_NOT_RUNNING: true,
  VM_NOT_OWNED: true,
  NAME_TAKEN: true,
  CERTIFICATE_EXPIRED: true,
  CLOCK_SKEW: true,
  TRANSPORT_UNAVAILABLE: true,
  RDMA_LIMIT: true,
  SOURCE_MEMORY: true,
  IDENTITY_PENDING: true,
  DISK_NOT_MOVABLE: true,
  DISK_NOT_SHARED: true,
  FILE_DIFFERS: true,
  STORAGE_NOT_PROVEN: true,
  DEVICE_CHANGED: true,
  PROTOCOL_VERSION: true,
  HOST_LIMIT: true,
  DATA_NOT_PROTECTED: true,
  MEMORY_NOT_VERIFIABLE: true,
  POLICY_FORBIDS: true,
  WRITE_PROTECT_MISSING: true,
  DOWNTIME_TOO_SHORT: true,
};

export type MigrationRefusalCode =
  | 'TARGET_IS_SOURCE'
  | 'TARGET_UNREACHABLE'
  | 'TARGET_MEMORY'
  | 'TARGET_HUGE_PAGES'
  | 'USERFAULTFD_NOT_PERMITTED'
  | 'RAM_NOT_SHARED'
  | 'RAM_NOT_NAMED_FILE'
  | 'PRELOAD_MISSING'
  | 'MACHINE_MISSING'
  | 'QEMU_TOO_OLD'
  | 'ACCEL_MISSING'
  | 'DISK_MISSING'
  | 'FILE_MISSING'
  | 'DISK_NOT_SHARED'
  | 'FILE_DIFFERS'
  | 'STORAGE_NOT_PROVEN'
  | 'DEVICE_CHANGED'
  | 'BRIDGE_MISSING'
  | 'DEVICE_NOT_MIGRATABLE'
  | 'VM_IN_JOB'
  | 'VM_NOT_RUNNING'
  | 'VM_NOT_OWNED'
  | 'NAME_TAKEN'
  | 'CERTIFICATE_EXPIRED'
  | 'CLOCK_SKEW'
  | 'TRANSPORT_UNAVAILABLE'
  | 'RDMA_LIMIT'
  | 'NO_SPACE'
  | 'SOURCE_MEMORY'
  | 'IDENTITY_PENDING'
  | 'DISK_NOT_MOVABLE'
  | 'PROTOCOL_VERSION'
  | 'HOST_LIMIT'
  | 'POLICY_FORBIDS'
  | 'DATA_NOT_PROTECTED'
  | 'MEMORY_NOT_VERIFIABLE'
  | 'WRITE_PROTECT_MISSING'
  | 'DOWNTIME_TOO_SHORT';

/** Codes that only forks use. A fork may also be refused with some of the codes of migrations. */
export type ForkRefusalCode =
  | 'CLONE_COUNT'
  | 'CLONE_NAME'
  | 'CLONE_MEMORY'
  | 'IMAGE_MEMORY'
  | 'IMAGE_INCOMPLETE'
  | 'VM_FILLING'
  | 'WRITES_ESCAPE'
  | 'DISK_NOT_SNAPSHOTTABLE'
  | 'HOST_RESOURCE'
  | 'DISK_CHANGED'
  | 'DISK_IN_USE'
  | 'DISK_CHAIN_LONG';

/** Codes that only the fan-out of a fork over hosts has. */
export type FanoutRefusalCode = 'FANOUT_UNAVAILABLE' | 'MULTICAST_NOT_ROUTED';

export type RefusalCode = MigrationRefusalCode | ForkRefusalCode | FanoutRefusalCode;

export interface Refusal {
  readonly code: RefusalCode;
  readonly reason: string;
  readonly remedy: string;
}

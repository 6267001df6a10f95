/**
 * The words of the project as types. Imports nothing; every layer may import it. Amounts carry their unit in the name; bytes that may exceed
 * 2^53 do not occur (a VM of 8 PiB is refused by the spec).
 */

export type Transport = 'tcp' | 'shm' | 'rdma';
export type TransportChoice = Transport | 'auto';
export type MigrationMode = 'postcopy' | 'native-precopy' | 'native-postcopy';

// ---- VM specs -------------------------------------------------------------------------------------------------------------------------

export interface DiskSpec {
  readonly id: string;
  readonly path: string;
  readonly format: 'raw' | 'qcow2';
  readonly isReadOnly: boolean;
}

export interface NicSpec {
  readonly id: string;
  /**
   * tap: a tap device on `bridge` · isolated: a tap on a bridge of that name in a network namespace of the VM's own · unplugged: a tap that joins no
   * bridge, for a clone whose NIC had a tap when its state was saved (what virtio-net offers depends on it) · none: no tap at all
   */
  readonly type: 'tap' | 'isolated' | 'unplugged' | 'none';
  /** Of tap and isolated. */
  readonly bridge?: string;
  readonly mac: string;
  readonly model: string;
}

/** Which of the clones of one fork a VM is. */
export interface CloneMark {
  readonly fork: string;
  /** 0 .. cloneCount - 1 */
  readonly index: number;
  readonly cloneCount: number;
}

export interface MemoryRegionSpec {
  readonly id: string;
  readonly lengthBytes: number;
}

/** A VM as its user described it, defaults filled in. `src/schemas/vm-spec.ts` parses it; docs and schema come from there. */
export interface VmSpec {
  readonly name: string;
  readonly uuid: string;
  /** QEMU machine type, resolved to a versioned name when the VM is started ("pc-q35-7.2"). */
  readonly machine: string;
  readonly accel: 'auto' | 'kvm' | 'tcg';
  readonly cpuModel: string;
  readonly cpus: number;
  readonly memory: {
    readonly sizeBytes: number;
    readonly pageBytes: number;
    /** One backend a NUMA node; their lengths sum up to sizeBytes. */
    readonly regions: readonly MemoryRegionSpec[];
    /**
     * shared: named file, moved by us. private: QEMU's own anonymous memory, moved by --native only. image: a clone's, the files of an image mapped
     * copy-on-write; no user may ask for it.
     */
    readonly backing: 'shared' | 'private' | 'image';
  };
  readonly kernel?: string;
  readonly initrd?: string;
  readonly append?: string;
  readonly disks: readonly DiskSpec[];
  readonly nics: readonly NicSpec[];
  readonly hasSerial: boolean;
  /** A port for Debian's qemu-guest-agent, or another that speaks its protocol. */
  readonly hasGuestAgent?: boolean;
  /** Program in the guest that its agent runs in a new clone, with index, count, name and fork; without it the agent sets the host name. */
  readonly guestAgentHook?: string;
  /**
   * Guid that the vmgenid device shows; another for every VM, kept when it moves. Absent: the VM was started before it had the devices that tell it
   * who it is (src/backends/qemu/identity-devices.ts), and has none of them.
   */
  readonly vmGenerationId?: string;
  /** Absent: no clone. */
  readonly clone?: CloneMark;
  /** Further `-device` values. */
  readonly devices: readonly string[];
  readonly qemuArgs: readonly string[];
  /** Start QEMU with the preload. Without it the VM can only be the source of a post-copy. */
  readonly hasPreload: boolean;
}

// ---- VMs on a host --------------------------------------------------------------------------------------------------------------------

/**
 * starting: QEMU is coming up · running, paused: as QEMU says · incoming: prepared as a target, not ours yet · departed: execution has moved
 * away, frozen memory is kept for the target · stopped: QEMU has ended
 */
export type VmState = 'starting' | 'running' | 'paused' | 'incoming' | 'departed' | 'stopped';

/** How QEMU ended, as far as the daemon saw it. */
export interface VmExit {
  readonly at: string;
  /** QEMU's own reason (SHUTDOWN event), or `killed`, `stopped`, `vanished` (it ended while no daemon ran). */
  readonly reason: string;
  readonly code: number | null;
  readonly signal: string | null;
  /** The guest's: what it wrote to its exit port; 0 if it powered off without a word; null if it did not end by itself. */
  readonly exitCode: number | null;
}

export interface VmView {
  readonly name: string;
  readonly uuid: string;
  readonly host: string;
  readonly state: VmState;
  readonly epoch: number;
  readonly memoryBytes: number;
  readonly pid: number | null;
  readonly machine: string;
  readonly accel: 'kvm' | 'tcg';
  /** The job that holds the VM, if any. */
  readonly job: string | null;
  readonly serialLog: string | null;
  /** The image whose pages a clone shares. */
  readonly image: string | null;
  /** What the guest has written to its exit port so far; a guest may be done without powering off. */
  readonly exitCode: number | null;
  /** null while QEMU lives. */
  readonly exit: VmExit | null;
  /** What a clone still lacks of an identity of its own, or why it could not get it; null for a VM that has one. */
  readonly identityIssue: string | null;
}

// ---- inventory: what pre-flight looks at -----------------------------------------------------------------------------------------------

export interface RdmaPort {
  readonly number: number;
  readonly isActive: boolean;
  /** As a person reads it. */
  readonly state: string;
  readonly linkLayer: string;
  /** Of the path; 0: the device does not say. */
  readonly mtuBytes: number;
  readonly gids: readonly string[];
  /** IP addresses of this host that lead to the port. */
  readonly addresses: readonly string[];
}

export interface RdmaDevice {
  readonly name: string;
  readonly isOnDemandPaging: boolean;
  readonly ports: readonly RdmaPort[];
}

export interface RdmaInventory {
  /** Why this host cannot use RDMA now, and what to do about it; null: it can, at `address` and `port`. */
  readonly problem: { readonly reason: string; readonly remedy: string } | null;
  readonly devices: readonly RdmaDevice[];
  readonly address: string | null;
  readonly port: number | null;
  /** What the daemon may still lock into memory; null: as much as there is. */
  readonly lockableBytes: number | null;
  /** What its memory cgroup still takes; null: there is no limit. */
  readonly cgroupFreeBytes: number | null;
}

export interface HostInventory {
  readonly host: string;
  /** Boot id + machine id: two daemons with the same one can use shm. */
  readonly machineId: string;
  readonly protocolVersion: number;
  readonly qemuVersion: string | null;
  readonly machines: readonly string[];
  readonly isKvmUsable: boolean;
  readonly isUserfaultfdPermitted: boolean;
  readonly hasMinorFaults: boolean;
  readonly isPreloadPresent: boolean;
  readonly memoryAvailableBytes: number;
  /** Free space of the file system that region files go to, and free huge pages by size. */
  readonly ramFileFreeBytes: number;
  readonly hugePagesFree: Readonly<Record<string, number>>;
  readonly dataAddress: string;
  readonly rdma: RdmaInventory;
  readonly vmNames: readonly string[];
  readonly bridges: readonly string[];
  /** ISO time until which the host's certificate is valid; null where no https API is configured. */
  readonly certificateExpiresAt: string | null;
  readonly clockMs: number;
}

/** What the source says of the VM that is to move. */
export interface VmInventory {
  readonly spec: VmSpec;
  readonly state: VmState;
  readonly epoch: number;
  readonly owner: string;
  readonly job: string | null;
  readonly qemuVersion: string;
  readonly accel: 'kvm' | 'tcg';
  readonly isRamShared: boolean;
  readonly isRamNamedFile: boolean;
  /** From query-migrate (blocked-reasons) and the device list. */
  readonly migrationBlockers: readonly string[];
  /** How much of its memory files has pages behind it. */
  readonly ramAllocatedBytes: number;
  /** Devices by which the guest gives memory back while it runs: behind the back of an RDMA device that has it registered. */
  readonly discardingDevices: readonly string[];
  /** null for any VM but a clone that runs on an image. */
  readonly image: ImageUse | null;
  /** What a clone still lacks of an identity of its own; null for a VM that has one. */
  readonly identityIssue: string | null;
  /** Ids of disks whose files end with the VM on this host. */
  readonly fleetingDisks: readonly string[];
  /** What the guest has written to its exit port so far. */
  readonly exitCode: number | null;
}

/** A clone's memory: an image's files, and in its process what it has written. */
export interface ImageUse {
  readonly id: string;
  readonly isComplete: boolean;
  /** At most so much has it written; there may be some of QEMU's own in it. */
  readonly ownBytes: number;
}

/** Where a host's memory can be read by RDMA. */
export interface RdmaPlace {
  readonly host: string;
  readonly port: number;
}

/** The target's answers to questions that only it can check for this very VM. */
export interface TargetChecks {
  readonly disks: readonly {
    readonly path: string;
    readonly isReadable: boolean;
    readonly isWritable: boolean;
    readonly reason?: string;
  }[];
  readonly files: readonly { readonly path: string; readonly isReadable: boolean }[];
  /** Whether the source answers at the RDMA address that it gives; null: it was not asked for. */
  readonly rdma: { readonly isReached: boolean; readonly reason?: string } | null;
}

// ---- requests, plans, jobs --------------------------------------------------------------------------------------------------------------

export interface MigrationRequest {
  readonly vm: string;
  readonly target: string;
  readonly mode: MigrationMode;
  readonly transport: Transport;
  readonly bandwidthBytesPerS: number;
  readonly downtimeMsMax: number;
}

/** What a user asks for. The planner makes a request of it: `auto` is rdma where both hosts have it, else tcp. */
export type MigrationOrder = Omit<MigrationRequest, 'transport'> & { readonly transport: TransportChoice };

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
  | 'SOURCE_MEMORY'
  | 'IDENTITY_PENDING'
  | 'DISK_NOT_MOVABLE'
  | 'PROTOCOL_VERSION';

/** Those that only a fork can meet; it may also be refused for some of the others. */
export type ForkRefusalCode =
  | 'CLONE_COUNT'
  | 'CLONE_MEMORY'
  | 'IMAGE_MEMORY'
  | 'IMAGE_INCOMPLETE'
  | 'VM_FILLING'
  | 'WRITES_ESCAPE'
  | 'WRITE_PROTECT_MISSING'
  | 'DISK_NOT_SNAPSHOTTABLE';

export type RefusalCode = MigrationRefusalCode | ForkRefusalCode;

export interface Refusal {
  readonly code: RefusalCode;
  readonly reason: string;
  readonly remedy: string;
}

/** One step of a migration. The engine has exactly one executor (and one undo) for each name; a new name without one does not compile. */
export type StepName =
  | 'reserve'
  | 'prepareTarget'
  | 'exposeSource'
  | 'connectTarget'
  | 'stopSource'
  | 'transferState'
  | 'commit'
  | 'resumeTarget'
  | 'drain'
  | 'releaseSource'
  | 'nativeStart'
  | 'nativeSwitchover';

export interface PlanStep {
  readonly name: StepName;
  /** Where it acts. */
  readonly host: string;
  /** One line for --dry-run. */
  readonly text: string;
  /** Source stops in it or has stopped before it: it counts to the blackout. */
  readonly isInBlackout: boolean;
  readonly timeoutMs: number;
}

export interface MigrationPlan {
  readonly request: MigrationRequest;
  /** Why it is this transport, for a person. */
  readonly transportReason: string;
  readonly source: string;
  readonly memoryBytes: number;
  readonly steps: readonly PlanStep[];
  readonly notes: readonly string[];
}

/**
 * running: going on · recovering: committed, something is unreachable, being retried · done · failed: the VM runs where it was ·
 * needsRecovery: committed, retries have ended, `vmigrate --recover JOB` goes on · lost: committed, and the VM's memory is gone
 */
export type JobState = 'queued' | 'running' | 'recovering' | 'done' | 'failed' | 'cancelled' | 'needsRecovery' | 'lost';

export interface PhaseTime {
  readonly name: string;
  readonly ms: number;
}

export interface MigrationProgress {
  readonly pagesTotal: number;
  readonly pagesDone: number;
  readonly bytesDone: number;
  readonly bytesPerS: number;
  readonly secondsLeft: number | null;
  readonly faultCount: number;
}

export interface MigrationReport {
  readonly job: string;
  readonly vm: string;
  readonly mode: MigrationMode;
  readonly transport: Transport;
  readonly transportReason: string;
  readonly source: string;
  readonly target: string;
  readonly memoryBytes: number;
  /** No vCPU ran: from just before the stop was sent to QEMU until the target's resume was acknowledged, by the coordinator's clock. */
  readonly blackoutMs: number;
  /** From QEMU's STOP event to QEMU's RESUME event, by the hosts' wall clocks: exact where these agree (one machine, PTP). */
  readonly blackoutByEventsMs: number;
  /** From resume until the last 10 ms window in which vCPUs waited for pages more than a tenth of the time. */
  readonly degradedMs: number;
  readonly totalMs: number;
  readonly rounds: number;
  readonly bytes: {
    readonly push: number;
    readonly demand: number;
    readonly prefetch: number;
    /** Bytes of pages known to be zero, never fetched. */
    readonly zeroSkipped: number;
    readonly deviceState: number;
  };
  readonly faults: { readonly count: number; readonly p50Us: number; readonly p99Us: number; readonly maxUs: number };
  readonly sourceCpuS: number;
  readonly targetCpuS: number;
  readonly reconnects: number;
  readonly phases: readonly PhaseTime[];
}

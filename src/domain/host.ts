import type { DataSecurity, RdmaTrust } from './data-security.js';
import type { HostResource } from './host-resource.js';
import type { ImageView } from './image.js';
import type { Forbidden } from './policy.js';
import type { RdmaInventory } from './transport.js';
import type { Accel, VmSpec, VmState } from './vm.js';

/** New work needs this much room for state: records, logs and sockets of a VM, and its lines in the journals. */
export const STATE_ROOM_BYTES = 8 * 1024 * 1024;

export interface HostInventory {
  readonly host: string;
  /** Boot id and machine id. Two daemons with the same value can use shm. */
  readonly machineId: string;
  readonly protocolVersion: number;
  /**
   * The newest version that the host speaks. Absent: `protocolVersion`. That is an older one where the host was told to
   * take hosts of an earlier build, because they refuse every version but their own.
   */
  readonly newestProtocolVersion?: number;
  readonly qemuVersion: string | null;
  readonly machines: readonly string[];
  readonly isKvmUsable: boolean;
  readonly isUserfaultfdPermitted: boolean;
  readonly hasMinorFaults: boolean;
  readonly isPreloadPresent: boolean;
  /** Why QEMU cannot be contained here, or null. Absent: the host does not contain it, or its build is older. */
  readonly containmentProblem?: string | null;
  /** Memory that is neither used nor promised to a VM or image, as are the two below. */
  readonly memoryAvailableBytes: number;
  /** Free space of the file system that region files go to, and free huge pages by size. */
  readonly ramFileFreeBytes: number;
  /** Why the daemon has no tmpfs of its own for region files. Absent if there is nothing to say. */
  readonly ramDirProblem?: string;
  /**
   * Room for new work on the file system of the state directory, 0 while its reserve is missing. Absent if the host's
   * build is older.
   */
  readonly stateFreeBytes?: number;
  readonly hugePagesFree: Readonly<Record<string, number>>;
  readonly dataAddress: string;
  /** The least that the host accepts on the data network. Absent: its build is older, and protects nothing. */
  readonly dataSecurity?: DataSecurity;
  /** The host can prove what memory has arrived, and what it was. Absent: its build is older. */
  readonly canVerifyMemory?: boolean;
  /** The host can fetch memory of a VM that still runs on its source. Absent: its build is older. */
  readonly canFetchAhead?: boolean;
  /** The kernel can note which pages a running VM writes. Absent: the host's build is older. */
  readonly canTrackWrites?: boolean;
  /** Absent: untrusted. */
  readonly rdmaTrust?: RdmaTrust;
  /** A file beside the data socket of this daemon. Absent if the host's build is older. */
  readonly socketMark?: SocketMark;
  readonly rdma: RdmaInventory;
  readonly vmNames: readonly string[];
  readonly bridges: readonly string[];
  /** Processors that the daemon may use. Absent from hosts of earlier builds. */
  readonly cpuCount?: number;
  /** ISO time until which the host's certificate is valid; null where no https API is configured. */
  readonly certificateExpiresAt: string | null;
  readonly clockMs: number;
  /** Absent from hosts of earlier builds. */
  readonly limits?: HostLimits;
  /** Why QEMU cannot be asked; absent if it can. */
  readonly qemuProblem?: string;
}

/** A daemon that sees this file under this path reaches the socket beside it, also from another mount namespace. */
export interface SocketMark {
  readonly path: string;
  /** As in a FileView. */
  readonly inode: string;
}

/** How much of a limit is used; both are counts. */
export interface LimitUse {
  readonly used: number;
  readonly max: number;
}

/** Limits that many VMs meet. Null: there is no such limit, or the kernel does not tell. */
export interface HostLimits {
  /** Descriptors of the daemon (RLIMIT_NOFILE, the soft limit). Node raises it to the hard limit at its start. */
  readonly openFiles: LimitUse | null;
  readonly openFilesOfHost: LimitUse | null;
  /** Processes and threads: the narrowest of cgroup, user and host. */
  readonly tasks: LimitUse | null;
  /** Memory mappings of the daemon (vm.max_map_count). */
  readonly mappings: LimitUse | null;
  readonly fileWatchesMax: number | null;
}

/** Upper bounds of what the daemon needs for one more VM or clone: connections, userfaultfds, pidfd. */
export const OPEN_FILES_PER_VM = 12;
/** What a session, a fork, requests and files opened for a moment need together. */
export const OPEN_FILES_RESERVE = 32;
/** QEMU's threads besides one for each vCPU. */
export const TASKS_PER_VM = 6;

/** Tunnels to disks that a host serves to others: one for each clone there and disk. */
export const DISK_TUNNELS_MAX = 512;
/** Tunnels for QEMU's own stream: one for each move that brings a VM here. */
export const STREAM_TUNNELS_MAX = 64;

/** What the source reports about the VM that is to move. */
export interface VmInventory {
  readonly spec: VmSpec;
  readonly state: VmState;
  readonly epoch: number;
  readonly owner: string;
  /** The id of this start of the VM. Absent from a host of build 0.1.0, and for a VM that such a build has started. */
  readonly incarnation?: string;
  readonly job: string | null;
  /** The host that the missing pages of the VM come from. Absent if it has all of its memory, as far as is known. */
  readonly arrivingFrom?: string;
  readonly qemuVersion: string;
  readonly accel: Accel;
  readonly isRamShared: boolean;
  readonly isRamNamedFile: boolean;
  /** Reasons against a migration, from query-migrate (blocked-reasons) and the device list. */
  readonly migrationBlockers: readonly string[];
  /** How much of the VM's memory files is allocated. */
  readonly ramAllocatedBytes: number;
  /** Devices through which the guest can free memory while it runs, which an RDMA device does not notice. */
  readonly discardingDevices: readonly string[];
  /** Devices by which processes other than QEMU write to guest memory. Absent from a host of build 0.1.0. */
  readonly escapingDevices?: readonly string[];
  /** Block nodes with cache.direct, by their names in QEMU. Absent from a host of build 0.1.0. */
  readonly directDisks?: readonly string[];
  /** The image that a clone runs on; null for any other VM. */
  readonly image: ImageUse | null;
  /** Which part of its own identity a clone still lacks; null for a VM that has all of it. */
  readonly identityIssue: string | null;
  /** Ids of disks whose files are deleted when the VM ends on this host. */
  readonly fleetingDisks: readonly string[];
  /** What the guest has written to its exit port so far. */
  readonly exitCode: number | null;
  /**
   * How the VM's devices differ from those that its spec makes. Absent from a host of build 0.1.0, which does not
   * look.
   */
  readonly deviceChanges?: readonly string[];
}

/** A clone's use of an image: pages that it has not written are in the image's files, the others in its process. */
export interface ImageUse {
  readonly id: string;
  readonly isComplete: boolean;
  /** Upper bound of the bytes that the clone has written; some of QEMU's own memory may be included. */
  readonly ownBytes: number;
}

/** Checks for this VM that only the target can make. */
export interface TargetChecks {
  readonly disks: readonly {
    readonly path: string;
    readonly isReadable: boolean;
    readonly isWritable: boolean;
    readonly reason?: string;
    /** What the host's policy does not allow of the disk, which was not opened then. Absent: nothing. */
    readonly forbidden?: readonly Forbidden[];
  }[];
  readonly files: readonly { readonly path: string; readonly isReadable: boolean }[];
  /** What the host's policy does not allow besides the disks; no file was opened then. Absent: nothing. */
  readonly forbidden?: readonly Forbidden[];
  /** Whether the target reaches the source at the source's RDMA address. null: not checked. */
  readonly rdma: { readonly isReached: boolean; readonly reason?: string } | null;
}

/** The facts that the pre-flight of a fork needs. */
export interface ForkInventory {
  /** The parent, or the VM of which the image was taken. */
  readonly vm: VmInventory;
  /** The image of the request, if it names one. */
  readonly image: ImageView | null;
  /** Devices whose writes bypass write protection, each with the reason. */
  readonly escapingDevices: readonly string[];
  readonly isWriteProtectSupported: boolean;
  readonly hasPreload: boolean;
  /** Pages of the VM are still arriving, or its image is still filling. */
  readonly isFilling: boolean;
  /** Disks that do not support snapshots, each with the reason. */
  readonly diskBlockers: readonly string[];
  /** What is left of the host's budget for images. */
  readonly imageBytesFree: number;
  /** What clones that share an image may still be promised, each with its whole memory. Absent: it is not limited. */
  readonly cloneBytesFree?: number | undefined;
  readonly memoryAvailableBytes: number;
  /** Memory that an image of this VM takes, and memory that each clone takes at its start. */
  readonly imageBytesNeeded: number;
  readonly cloneBytesNeeded: number;
  /** Number of waiting processes that fit the request. */
  readonly warmCloneCount: number;
  /** Those names of the requested clones that VMs on this host already have. */
  readonly namesTaken: readonly string[];
  /** Things of the host that the spec names and that only one VM can have. Absent from build 0.1.0. */
  readonly hostResources?: readonly HostResource[];
  // A host of build 0.1.0 does not report the following.
  /** Those that VMs on other hosts have, each with that host, as far as the hosts answer. */
  readonly namesElsewhere?: readonly string[];
  /** Those that ended VMs have, whose exit codes and logs would be lost. Empty if the request replaces them. */
  readonly namesOfEnded?: readonly string[];
  /** Why no clone may start on the disks of the image, or null. */
  readonly diskProblem?: { readonly code: 'DISK_CHANGED' | 'DISK_IN_USE'; readonly reason: string } | null;
  /** Disks of the parent that cannot get another overlay, each with the reason. */
  readonly longChains?: readonly string[];
  /** Why waiting processes of the parent do not fit the request. Null if there are none, or if they fit. */
  readonly coldReason?: string | null;
  /** Why this host cannot serve the disks to others, or null. Absent: there are none, or it does not have them. */
  readonly servingProblem?: string | null;
  /** The files that the back end's own arguments of an image name. */
  readonly argumentFiles?: readonly string[];
  readonly limits?: HostLimits;
  /** As in HostInventory. */
  readonly stateFreeBytes?: number;
}

export interface VmIdentity {
  readonly name: string;
  readonly uuid: string;
}

/** No host starts or moves a VM so often. A larger epoch would leave no room for the next one. */
export const EPOCH_MAX = 2 ** 48;

/** What a host knows of a VM's name and UUID. A state may be one of a newer version. */
export interface VmClaims {
  /** Its VMs with that name or that UUID that have not ended. */
  readonly vms: readonly { readonly name: string; readonly uuid: string; readonly state: string }[];
  /** The newest epoch of that name that it knows. 0: none. */
  readonly lastEpoch: number;
  /** The host that its record of that name gives as owner, and the id of that start of the VM. */
  readonly owner: string | null;
  readonly incarnation: string | null;
}

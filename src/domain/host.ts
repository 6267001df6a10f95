import type { ImageView } from './image.js';
import type { RdmaInventory } from './transport.js';
import type { Accel, VmSpec, VmState } from './vm.js';

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
  readonly accel: Accel;
  readonly isRamShared: boolean;
  readonly isRamNamedFile: boolean;
  /** From query-migrate (blocked-reasons) and the device list. */
  readonly migrationBlockers: readonly string[];
  /** How much of its memory files has pages behind it. */
  readonly ramAllocatedBytes: number;
  /**
   * Devices by which the guest gives memory back while it runs: behind the back of an RDMA device that has it
   * registered.
   */
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

/** What pre-flight asks about a fork. */
export interface ForkInventory {
  /** The parent, or the VM that the image was taken of. */
  readonly vm: VmInventory;
  /** The image of the request, if it names one. */
  readonly image: ImageView | null;
  /** Devices whose writes escape write-protection, each with why. */
  readonly escapingDevices: readonly string[];
  readonly isWriteProtectSupported: boolean;
  readonly hasPreload: boolean;
  /** Pages of the VM are still arriving, or its image is still filling. */
  readonly isFilling: boolean;
  /** Disks that no snapshot can be taken of, each with why. */
  readonly diskBlockers: readonly string[];
  /** Free for images, after the host's budget. */
  readonly imageBytesFree: number;
  readonly memoryAvailableBytes: number;
  /** What an image of this VM would take, and each clone at its start. */
  readonly imageBytesNeeded: number;
  readonly cloneBytesNeeded: number;
  /** Waiting processes that fit the request. */
  readonly warmCloneCount: number;
  /** Of the names that the clones would have. */
  readonly namesTaken: readonly string[];
}

export const DISK_FORMATS = ['raw', 'qcow2'] as const;
export type DiskFormat = (typeof DISK_FORMATS)[number];
export const NIC_TYPES = ['tap', 'isolated', 'unplugged', 'none'] as const;
export type NicType = (typeof NIC_TYPES)[number];
/** How QEMU runs the vCPUs. `auto` is kvm where the processor has vmx or svm. */
export const ACCELS = ['kvm', 'tcg'] as const;
export type Accel = (typeof ACCELS)[number];
export const ACCEL_CHOICES = ['auto', ...ACCELS] as const;
export type AccelChoice = (typeof ACCEL_CHOICES)[number];
export const MEMORY_BACKINGS = ['shared', 'private', 'image'] as const;
export type MemoryBacking = (typeof MEMORY_BACKINGS)[number];

export interface DiskSpec {
  readonly id: string;
  readonly path: string;
  readonly format: DiskFormat;
  readonly isReadOnly: boolean;
}

export interface NicSpec {
  readonly id: string;
  /**
   * tap: a tap device on `bridge` · isolated: a tap on a bridge of that name in a network namespace of the VM's own ·
   * unplugged: a tap that joins no bridge, for a clone whose NIC had a tap when its state was saved (what virtio-net
   * offers depends on it) · none: no tap at all
   */
  readonly type: NicType;
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

/**
 * A VM as its user described it, defaults filled in. `src/schemas/vm-spec.ts` parses it; docs and schema come from
 * there.
 */
export interface VmSpec {
  readonly name: string;
  readonly uuid: string;
  /** QEMU machine type, resolved to a versioned name when the VM is started ("pc-q35-7.2"). */
  readonly machine: string;
  readonly accel: AccelChoice;
  readonly cpuModel: string;
  readonly cpus: number;
  readonly memory: {
    readonly sizeBytes: number;
    readonly pageBytes: number;
    /** One backend a NUMA node; their lengths sum up to sizeBytes. */
    readonly regions: readonly MemoryRegionSpec[];
    /**
     * shared: named file, moved by us. private: QEMU's own anonymous memory, moved by --native only. image: a clone's,
     * the files of an image mapped copy-on-write; no user may ask for it.
     */
    readonly backing: MemoryBacking;
  };
  readonly kernel?: string;
  readonly initrd?: string;
  readonly append?: string;
  readonly disks: readonly DiskSpec[];
  readonly nics: readonly NicSpec[];
  readonly hasSerial: boolean;
  /** A port for Debian's qemu-guest-agent, or another that speaks its protocol. */
  readonly hasGuestAgent?: boolean;
  /**
   * Program in the guest that its agent runs in a new clone, with index, count, name and fork; without it the agent
   * sets the host name.
   */
  readonly guestAgentHook?: string;
  /**
   * Guid that the vmgenid device shows; another for every VM, kept when it moves. Absent: the VM was started before it
   * had the devices that tell it who it is (src/backends/qemu/identity-devices.ts), and has none of them.
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

/**
 * starting: QEMU is coming up · running, paused: as QEMU says · incoming: prepared as a target, not ours yet ·
 * departed: execution has moved away, frozen memory is kept for the target · stopped: QEMU has ended
 */
export const VM_STATES = ['starting', 'running', 'paused', 'incoming', 'departed', 'stopped'] as const;
export type VmState = (typeof VM_STATES)[number];

/** How QEMU ended, as far as the daemon saw it. */
export interface VmExit {
  readonly at: string;
  /** QEMU's own reason (SHUTDOWN event), or `killed`, `stopped`, `vanished` (it ended while no daemon ran). */
  readonly reason: string;
  readonly code: number | null;
  readonly signal: string | null;
  /**
   * The guest's: what it wrote to its exit port; 0 if it powered off without a word; null if it did not end by itself.
   */
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
  readonly accel: Accel;
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

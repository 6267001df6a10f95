export const DISK_FORMATS = ['raw', 'qcow2'] as const;
export type DiskFormat = (typeof DISK_FORMATS)[number];
export const NIC_TYPES = ['tap', 'isolated', 'unplugged', 'none'] as const;
export type NicType = (typeof NIC_TYPES)[number];
/** How QEMU runs the vCPUs. `auto` means kvm if the processor has vmx or svm. */
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
  /**
   * The disk is that of an image on another host, which serves it. `path` is the clone's overlay on it; of a disk that
   * is only read, the path on that host. Absent: this host has all files of the disk.
   */
  readonly served?: ServedDisk;
}

export interface ServedDisk {
  readonly host: string;
  readonly image: string;
}

export interface NicSpec {
  readonly id: string;
  /**
   * tap: a tap device on `bridge` · isolated: a tap on a bridge of that name in the VM's own network namespace ·
   * unplugged: a tap without a bridge, for a clone whose NIC had a tap when its state was saved (the features that
   * virtio-net offers depend on the tap) · none: no tap
   */
  readonly type: NicType;
  /** Set for tap and isolated. */
  readonly bridge?: string;
  readonly mac: string;
  readonly model: string;
}

/** Identifies a VM as one of the clones of a fork. */
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
 * A user's description of a VM, with defaults filled in. `src/schemas/vm-spec.ts` parses it, and generates its schema
 * and documentation.
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
    /** One memory backend for each NUMA node; the lengths add up to sizeBytes. */
    readonly regions: readonly MemoryRegionSpec[];
    /**
     * shared: a named file, moved by vmigrate. private: QEMU's anonymous memory, moved by --native only. image: files
     * of an image mapped copy-on-write, used by clones only; a user's spec cannot ask for it.
     */
    readonly backing: MemoryBacking;
  };
  readonly kernel?: string;
  readonly initrd?: string;
  readonly append?: string;
  readonly disks: readonly DiskSpec[];
  readonly nics: readonly NicSpec[];
  readonly hasSerial: boolean;
  /** The VM has a port for qemu-guest-agent, or for another agent that speaks its protocol. */
  readonly hasGuestAgent?: boolean;
  /**
   * Program in the guest that the guest agent runs in a new clone, with index, count, name and fork as arguments.
   * Without it the agent sets the host name.
   */
  readonly guestAgentHook?: string;
  /**
   * GUID of the vmgenid device: different for every VM, unchanged when a VM moves. Absent: the VM was started by a
   * build without identity devices (src/backends/qemu/identity-devices.ts), and so has none of them.
   */
  readonly vmGenerationId?: string;
  /** Absent if the VM is not a clone. */
  readonly clone?: CloneMark;
  /** Additional `-device` values. */
  readonly devices: readonly string[];
  readonly qemuArgs: readonly string[];
  /** QEMU starts with the preload library. Without it the VM can only be the source of a post-copy migration. */
  readonly hasPreload: boolean;
}

/**
 * starting: QEMU is starting · running, paused: as QEMU reports · incoming: prepared as a target, not owned by this
 * host yet · departed: execution has moved away, and the frozen memory is kept for the target · stopped: QEMU has ended
 * · unreadable: the VM's record is damaged, so it is only listed
 */
export const VM_STATES = ['starting', 'running', 'paused', 'incoming', 'departed', 'stopped', 'unreadable'] as const;
export type VmState = (typeof VM_STATES)[number];

/** How QEMU ended, as far as the daemon knows. */
export interface VmExit {
  readonly at: string;
  /**
   * The reason in QEMU's SHUTDOWN event, such as `guest-shutdown`; `panicked`; or `stopped` (by a user), `forked` (its
   * memory became an image), `memory` (a clone was ended because the clones of this host had written more than their
   * budget), `killed`, or `vanished` (QEMU ended while no daemon ran).
   */
  readonly reason: string;
  readonly code: number | null;
  readonly signal: string | null;
  /**
   * The guest's exit code: what it wrote to its exit port, 0 if it powered off without writing one, null if it did not
   * end by itself.
   */
  readonly exitCode: number | null;
}

/**
 * How a stop went. shutDown: the guest reacted to its power button · noReaction: it did not in time, so QEMU was
 * ended · ended: QEMU was ended without asking the guest · killed: by force · removed: it had ended before ·
 * endedMeanwhile: it ended otherwise while the guest was waited for, for example by another stop
 */
export const STOP_WAYS = ['shutDown', 'noReaction', 'ended', 'killed', 'removed', 'endedMeanwhile'] as const;
export type StopWay = (typeof STOP_WAYS)[number];

export interface StopResult {
  readonly name: string;
  readonly how: StopWay;
  /** The guest's exit code, and why the VM ended, as in VmExit. */
  readonly exitCode: number | null;
  readonly reason: string | null;
}

/** A move whose pages have not all arrived, as either end sees it. */
interface OpenMove {
  readonly job: string;
  /** How much of the memory has arrived; null if only the other end, or QEMU itself, knows. */
  readonly percent: number | null;
  /** Nothing arrives at present: the guest stands still as soon as it needs a page that is missing. */
  readonly isStalled: boolean;
}

/** The VM arrives at this host. */
export interface Arrival extends OpenMove {
  readonly source: string;
  /** Since when the VM runs here without all of its memory; null before it runs. */
  readonly incompleteSince: string | null;
}

/** The VM leaves this host, or has left it and its frozen memory is still fetched from here. */
export interface Departure extends OpenMove {
  readonly target: string;
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
  /** The exit code that the guest has written to its exit port; a guest may finish without powering off. */
  readonly exitCode: number | null;
  /** null while QEMU runs. */
  readonly exit: VmExit | null;
  /** Which part of its own identity a clone still lacks, or why it could not get it; null for any other VM. */
  readonly identityIssue: string | null;
  /** What the start of the VM could not find out, for example from a host that does not answer. Only in its answer. */
  readonly warnings?: readonly string[];
  /**
   * What is wrong, for people: the records of this host do not fit those of another one, or the VM waits for a disk
   * that another host serves. Absent if nothing is known to be.
   */
  readonly notice?: string;
  /** Why the VM stands still for good: its memory is not what its image was. Absent: it is whole. */
  readonly damage?: string;
  /** Absent if the VM has all of its memory. */
  readonly arriving?: Arrival;
  /** Absent if no move of the VM from this host is under way. */
  readonly leaving?: Departure;
}

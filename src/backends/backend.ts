/**
 * What a host's agent needs of whatever runs its VMs. A back end is a folder beside this file that implements
 * VmBackend, and one line in the daemon (src/cli/daemon.ts) that makes it; nothing in agent/ or above it knows which
 * one there is.
 *
 * VmBackend is about the host, VmProcess about one VM. What they leave to the agent: records, memory files, taps,
 * network namespaces, the preload, owner records, and when anything of all this is done.
 *
 * A VM is one process on this host, with a process id: its memory is mapped, watched and copied from there. It outlives
 * the daemon, and is found again by its id and its place.
 *
 * The life of a VmProcess, by the calls that change it; what else it offers is allowed while it is connected:
 *
 *   new ── launch ──► started ── ready ──► connected ── (connection lost) ──► lost ── connect ──► connected
 *   new ── connect (of an earlier daemon) ──► connected             any ── close ──► closed
 *
 * Errors, unless a call says otherwise: QEMU_GONE where it is not connected or ends meanwhile, QEMU_FAILED where the VM
 * refuses, TIMEOUT where it does not answer. They are the codes of every back end, whatever its name.
 *
 * Times: `Us` and `Ms` of an event (STOP, RESUME) are by the wall clock of whatever runs the VM, durations in ms.
 */
import type { Readable } from 'node:stream';
import type { MigrationError } from '../domain/errors.js';
import type { MigrationMode } from '../domain/migration.js';
import type { DiskSpec, NicSpec, VmSpec } from '../domain/vm.js';
import type { ChildExit, ProcessIdentity } from '../kit/process.js';

/** What is installed on a host, and what it does without any one VM. Stateless for its caller; calls may overlap. */
export interface VmBackend {
  /** Asked once a daemon, again only after a failure. UNSUPPORTED if there is none, or it does not work. */
  installed(): Promise<Installed>;
  /** The versioned name that an alias stands for here ("q35" → "pc-q35-7.2"). UNSUPPORTED if there is no such one. */
  resolveMachine(machine: string): Promise<string>;
  /** Looked at anew each time. */
  isKvmUsable(): Promise<boolean>;
  /** UNSUPPORTED if it has to be kvm and cannot be. */
  resolveAccel(accel: 'auto' | 'kvm' | 'tcg'): Promise<'kvm' | 'tcg'>;
  /** What the words of a spec that are the back end's own (`devices`, `qemuArgs`) mean for a move or a fork. */
  devicesIn(spec: VmSpec): SpecDevices;
  readonly diskFiles: DiskFiles;
  /** SPEC_INVALID if no VM can have its files there: the path of a socket is too long. */
  checkPlace(place: VmPlace): void;
  /** The handle on the VM at `place`: one for as long as the daemon knows the VM. Starts and touches nothing. */
  processAt(place: VmPlace): VmProcess;
  /** Processes of a VM at this place that a crash has kept from being written down. */
  findStray(place: VmPlace): Promise<readonly ProcessIdentity[]>;
}

export interface Installed {
  /** "7.2.22"; VmInventory.qemuVersion of the VMs started with it. */
  readonly version: string;
  readonly machines: readonly string[];
}

/** By name. Of the spec alone: what a VM that is there has, its `facts` say. */
export interface SpecDevices {
  /** Their state cannot be moved, which would only be said when a migration is started. */
  readonly withoutState: readonly string[];
  /** By them others than the VM's own process write to guest memory. */
  readonly escaping: readonly string[];
  /** By them the guest gives pages back to the host. */
  readonly discarding: readonly string[];
}

/** Disk images that no VM has open for writing, or (virtualSizeBytes, whyNot) one may have. */
export interface DiskFiles {
  /** The size that a guest sees. */
  virtualSizeBytes(path: string, format: DiskSpec['format']): Promise<number>;
  /** A qcow2 without content of its own. Its base is not opened. */
  createOverlay(path: string, base: Pick<DiskSpec, 'path' | 'format'>, sizeBytes: number): Promise<void>;
  /** What is in the overlay goes into its base. NO_SPACE if there is no room. */
  commitOverlay(path: string): Promise<void>;
  /** null: with all that it lies on it opens as a disk of that format. */
  whyNot(path: string, format: DiskSpec['format']): Promise<string | null>;
}

/** Where a VM has its files. All paths absolute; those of sockets lie in `directory`. */
export interface VmPlace {
  readonly name: string;
  /** The VM's own. The back end may keep sockets of its own in it, which go with it. */
  readonly directory: string;
  /** Of the serial port, if the spec has one: a socket that gives one connection the console, and all its output. */
  readonly serialPath: string;
  readonly serialLogPath: string;
  /** Takes what the guest writes to its exit port. */
  readonly exitPath: string;
  /** Socket of the guest agent's port, if the spec has one. */
  readonly agentPath: string;
  /** What the process itself says. */
  readonly outputPath: string;
}

export interface Command {
  readonly program: string;
  readonly args: readonly string[];
  /** All that the process gets besides PATH. */
  readonly environment: Readonly<Record<string, string>>;
}

export interface LaunchOrder {
  readonly spec: VmSpec;
  readonly accel: 'kvm' | 'tcg';
  /** One for each region of a VM whose memory is in files, in the spec's order. They are there. */
  readonly ramPaths: readonly string[];
  /** Tap device for each NIC that has one, by the NIC's id. In a VM with isolated NICs the process makes them. */
  readonly taps: Readonly<Record<string, string>>;
  /** It waits for the state of another VM: `importState`, or with `statePath` `loadFile`. */
  readonly isIncoming: boolean;
  /** What `loadFile` will read; opened here, written by others until then. */
  readonly statePath?: string;
  /** The preload's. */
  readonly environment: Readonly<Record<string, string>>;
  /** How to start it where it belongs: a network namespace of its own. */
  readonly enclose: (command: Command) => Command;
  /** At once, while the process has a single thread. */
  readonly onSpawned: (pid: number) => void;
}

/** A VM whose process is there. The caller writes `identity` down before it goes on. */
export interface StartedVm {
  readonly identity: ProcessIdentity;
  /** Never rejects. */
  readonly exited: Promise<ChildExit>;
  /**
   * Resolves when the VM is connected and stands still, no vCPU has run. `mapped` is awaited first: it resolves when
   * all memory is mapped, and is told by its signal that nobody waits any more. QEMU_FAILED with the process's own
   * words if that gave up, CANCELLED if `signal` aborts; the process is the caller's to end.
   */
  ready(mapped: (signal: AbortSignal) => Promise<void>, signal: AbortSignal): Promise<void>;
}

export type RunState = 'running' | 'paused';

export interface VmListener {
  /** Its vCPUs have been stopped or let run, by whomever. */
  onRunState(state: RunState): void;
  /** It is about to end. `reason` in the back end's own words; `isPowerOff`: the guest has switched itself off. */
  onShutdown(reason: string, isPowerOff: boolean): void;
  /** Once for each connection: the process has ended, or does not answer for now. Also if that was before `follow`. */
  onLost(): void;
}

/** One VM. Its methods may be called at the same time unless one says otherwise. */
export interface VmProcess {
  /** Once, of a new one. QEMU_FAILED if the program cannot be started. */
  launch(order: LaunchOrder): Promise<StartedVm>;
  /** To a process of an earlier daemon, or again after the connection was lost. One call at a time. */
  connect(): Promise<RunState>;
  /** Waits up to 10 s until it is connected. QEMU_GONE then, or at once if it is new or closed. */
  connected(): Promise<void>;
  /** Events of the present connection; ask again after each `connect`. Nothing happens if there is none. */
  follow(listener: VmListener): void;
  /** Final; the process lives on. Idempotent. */
  close(): void;

  /** Its vCPUs run. Not while a state is on its way in or out: those have a `run` or `resume` of their own. */
  run(): Promise<void>;
  pause(): Promise<void>;
  /** The guest is told by its power button, and ends itself if it likes. */
  powerdown(): Promise<void>;
  /** The process ends, whatever its guest does. */
  quit(): Promise<void>;
  /** `error` with what the process has said last, if it has ended. */
  explain(error: unknown): Promise<MigrationError>;

  readonly facts: VmFacts;
  readonly disks: VmDisks;
  /** TIMEOUT if the guest does not let go of a NIC: it runs on, and that NIC is connected to nothing. Repeatable. */
  replaceNics(order: NicOrder): Promise<void>;
  /** TIMEOUT if no agent answers in the guest. The caller closes it. Needs no connection. */
  guestAgent(timeoutMs: number): Promise<GuestAgentLink>;
  /** Switches and peers are told where the guest's addresses are now, several times. */
  announce(): Promise<void>;

  /** The way of a VM's device state out, for a VM that leaves and for one that is forked. It runs on. */
  exportState(): Promise<StateExport>;
  /**
   * The way of a VM's state in. At most one for a process, which was launched as incoming. `isTakenUp`: the process is
   * an earlier daemon's, and is not asked before somebody needs to know; it may be unconnected still.
   */
  importState(mode: MigrationMode, isTakenUp: boolean): StateImport;
  /** Before `loadFile`, and long before: what can be done without the state. */
  prepareFile(): Promise<void>;
  /** Loads the state from the `statePath` that it was launched with. It begins with `loaded`. */
  loadFile(): FileLoad;

  /**
   * The back end's own migration, of VMs whose RAM is not ours to move. Resolves when the VM stands still here and
   * everything that the target needs to run it has been sent: all of it (pre-copy), or the device state (post-copy). If
   * it fails before, the VM runs on here by itself. PEER_PROTOCOL for a `uri` that no `StateImport.listen` has said.
   */
  nativeMove(order: NativeMoveOrder): Promise<void>;
  /** Keys as src/engine/ports names them. Waits as `connected` does. */
  nativeReading(): Promise<Readonly<Record<string, number | string>>>;
  /** Ends any migration that can still be ended. Idempotent. Waits as `connected` does. */
  cancelMove(): Promise<void>;
  /**
   * The VM runs on here, whatever its migration was at; the caller has made sure that it may. Idempotent. Waits as
   * `connected` does.
   */
  runAgain(): Promise<void>;
}

export interface VmFacts {
  /** Reasons against a migration, and devices that post-copy cannot serve. Empty: nothing is in the way. */
  migrationBlockers(): Promise<string[]>;
  /** Devices by which the guest gives pages back to the host. */
  discardingDevices(): Promise<string[]>;
  /** Ids of the memory regions that are mapped so that writes go to their files. */
  sharedRegions(): Promise<ReadonlySet<string>>;
}

export interface NicOrder {
  /** As the VM was started. */
  readonly spec: VmSpec;
  /** As they shall be: the same ids in the same order. */
  readonly nics: readonly NicSpec[];
  /** The NIC is as it shall be, and connected to nothing: its tap may join a bridge. */
  readonly onPresent: (nic: NicSpec) => Promise<void>;
  /** How long the guest may take for each. Default 120 s. */
  readonly unplugTimeoutMs?: number;
}

/** One command at a time. QEMU_FAILED if the agent refuses, QEMU_GONE if its port is closed. */
export interface GuestAgentLink {
  /** Wall clock, ms since 1970. */
  setTime(timeMs: number): Promise<void>;
  timeMs(): Promise<number>;
  /** Runs a program in the guest until it ends. QEMU_FAILED if it does not end with 0. */
  run(path: string, args: readonly string[], timeoutMs: number): Promise<void>;
  /** Idempotent. */
  close(): void;
}

/** A disk that is to go on in an overlay; the names are the back end's own. */
export interface OpenOverlay {
  readonly node: string;
  readonly overlay: string;
}

/** A disk of the VM and a qcow2 on the file that it had before. */
export interface DiskOverlay {
  /** The disk's. */
  readonly id: string;
  readonly path: string;
  readonly base: Pick<DiskSpec, 'path' | 'format'>;
}

export interface VmDisks {
  /** What the disks of the guest read and write now, by the disk's id; for one that no spec names, by its device. */
  active(): Promise<ReadonlyMap<string, { readonly path: string; readonly isReadOnly: boolean }>>;
  /** It has this file open as a disk, or below one. */
  isOpen(path: string): Promise<boolean>;
  /**
   * Opens overlays that are to lie on what disks read now. Each is closed if an earlier attempt has left it open, then
   * made by `create`. The guest notices nothing. `image` and the order of the overlays name them: the same at every
   * attempt. CONFLICT if the guest has no such disk.
   */
  openOverlays(
    image: string,
    overlays: readonly DiskOverlay[],
    create: (overlay: DiskOverlay, index: number) => Promise<void>,
  ): Promise<readonly OpenOverlay[]>;
  /** Every disk goes on in its overlay, all at one moment, or none. The VM stands still. */
  switchToOverlays(open: readonly OpenOverlay[]): Promise<void>;
  /**
   * Undo of both, for the overlay at `index`: its disk is back on the base, with what was written since. `open` as far
   * as this daemon knows. The VM may run.
   */
  takeOut(image: string, index: number, overlay: DiskOverlay, open: readonly OpenOverlay[]): Promise<void>;
  /** What is in the overlay goes into its base, and it leaves the disk's chain. False: this VM has no such chain. */
  merge(overlay: DiskOverlay): Promise<boolean>;
}

export type StateStream = Readable & { readonly bytesRead: number };

/** What is done with the stream. Resolves with its length when all of it has arrived where it is to go. */
export type StateConsumer = (stream: StateStream) => Promise<number>;

/**
 * A stream of device state, begun while the VM still runs, so that while it stands still only device state proper is
 * saved. If it breaks before it is complete the VM runs on by itself; once it is complete, never.
 *
 *   stop ──► transfer ──► (resume)            end, after which stop may come again            close
 */
export interface StateExport {
  /** Resolves when the VM stands still, its disks drained. The VM runs during most of this call. */
  stop(consume: StateConsumer): Promise<{ readonly stoppedAtUs: number }>;
  /**
   * Resolves when the consumer has all of it and the VM is done with it: `doneAtMs`, by performance.now(), which may be
   * sooner.
   */
  transfer(): Promise<{ readonly deviceStateBytes: number; readonly doneAtMs: number }>;
  /** After `transfer`: the VM runs on here. Resolves with the moment, µs. CANCELLED if the attempt has ended. */
  resume(): Promise<number>;
  /** The attempt is over, whatever it was at; whoever waits gets CANCELLED. Idempotent. */
  end(): void;
  /** Idempotent. */
  close(): Promise<void>;
}

/** How far memory that comes by the back end's own post-copy is. */
export type NativeArrival = 'filling' | 'complete' | 'failed';

/**
 *   listen ──► accept ──► loaded ──► attach ──► readyToRun ──► (the answer is called: the VM runs)
 *
 * `accept` only of `postcopy`, whose device state comes through us.
 */
export interface StateImport {
  /** Where the source's own migration is to go; null for `postcopy`. `address`: of this host. Once. */
  listen(address: string): Promise<string | null>;
  /** `body` until its end. Resolves when all of it is loaded. CONFLICT if none is waited for, or one is here. */
  accept(body: Readable): Promise<void>;
  /** Everything is loaded, as far as is known. */
  readonly isLoaded: boolean;
  /** QEMU_FAILED if it ends meanwhile. */
  loaded(): Promise<void>;
  /** null, at once, unless the process is an earlier daemon's; then it is asked how far it is. */
  attach(): Promise<void> | null;
  /**
   * After `attach`, and before the VM is made ours: CONFLICT if not everything is loaded, QEMU_GONE if it is not
   * connected. What it answers lets the VM run, in the very call, and resolves with the moment, µs.
   */
  readyToRun(): () => Promise<number>;
  /** Of a VM that runs, for the modes other than `postcopy`. */
  nativeArrival(): Promise<NativeArrival>;
  /** Whoever waits gets `error`. Idempotent. */
  end(error: MigrationError): void;
}

/** Of a VM that runs on an image. */
export interface FileLoad {
  /** Begins, and resolves when everything is loaded. Once. */
  loaded(): Promise<void>;
  /** After `loaded`. Resolves when the vCPUs run. */
  run(): Promise<void>;
  /** Whoever waits gets CANCELLED. Idempotent; the VM is left as it is. */
  end(): void;
}

export interface NativeMoveOrder {
  /** As the target's `StateImport.listen` has said it. */
  readonly uri: string;
  readonly isPostcopy: boolean;
  /** 0: no limit of ours. */
  readonly bandwidthBytesPerS: number;
  readonly downtimeMsMax: number;
}

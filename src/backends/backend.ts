/**
 * The interface between a host's agent and the back end that runs its VMs. A back end is a folder beside this file that
 * implements VmBackend, and one line in src/daemon/daemon.ts that creates it. No code in agent/ or above it
 * knows which back end runs.
 *
 * VmBackend is about the host, VmProcess about one VM. The agent does the rest: records, memory files, taps, network
 * namespaces, the preload, owner records. The agent also decides when each call is made.
 *
 * A VM is one process on this host, with a process id: its memory is mapped, watched and copied from there. The process
 * outlives the daemon. A restarted daemon finds it by its process id and its place.
 *
 * The diagram shows the life of a VmProcess by the calls that change it. All other calls need a connection:
 *
 *   new ── launch ──► started ── ready ──► connected ── (connection lost) ──► lost ── connect ──► connected
 *   new ── connect (of an earlier daemon) ──► connected             any ── close ──► closed
 *
 * Unless a call says otherwise, it throws QEMU_GONE if the process is not connected or ends meanwhile, QEMU_FAILED if
 * the VM refuses, and TIMEOUT if the VM does not answer. Every back end uses these codes, whatever its name.
 *
 * The times of an event (STOP, RESUME), in `Us` or `Ms`, are by the wall clock of the VM's process. Durations are in
 * ms.
 */

import type { Duplex, Readable } from 'node:stream';
import type { MigrationError } from '../domain/errors.js';
import type { HostResource } from '../domain/host-resource.js';
import type { MigrationMode } from '../domain/migration.js';
import type { ArgumentFile, OpenFile } from '../domain/storage.js';
import type { Accel, AccelChoice, NicSpec, VmSpec } from '../domain/vm.js';
import type { ChildExit, ProcessIdentity } from '../kit/process.js';
import type { DiskExports } from './disk-export.js';
import type { DiskFiles } from './disk-files.js';
import type { VmDisks } from './vm-disks.js';

/**
 * The installed back end of a host and its calls that concern no single VM. Its caller sees no state; calls may
 * overlap.
 */
export interface VmBackend {
  /** The answer is cached, except a failure. Throws UNSUPPORTED if nothing is installed or if it does not work. */
  installed(): Promise<Installed>;
  /** Resolves an alias to the versioned name ("q35" → "pc-q35-7.2"). Throws UNSUPPORTED for an unknown machine. */
  resolveMachine(machine: string): Promise<string>;
  /** Each call checks again. */
  isKvmUsable(): Promise<boolean>;
  /** Throws UNSUPPORTED if the caller asks for kvm and the host cannot use it. */
  resolveAccel(accel: AccelChoice): Promise<Accel>;
  /** Says what the back end's own fields of a spec (`devices`, `qemuArgs`) mean for a move or a fork. */
  devicesIn(spec: VmSpec): SpecDevices;
  /** Returns the files that the back end's own fields of a spec name. */
  filesIn(spec: VmSpec): readonly ArgumentFile[];
  readonly diskFiles: DiskFiles;
  readonly diskExports: DiskExports;
  /** Throws SPEC_INVALID if no VM can have its files there, because the path of a socket is too long. */
  checkPlace(place: VmPlace): void;
  /**
   * Makes the handle on the VM at `place`, one for as long as the daemon knows the VM. The call has no other effect.
   */
  processAt(place: VmPlace): VmProcess;
  /** Finds processes of a VM at this place that are not recorded because of a crash. */
  findStray(place: VmPlace): Promise<readonly ProcessIdentity[]>;
}

export interface Installed {
  /** A version such as "7.2.22". It becomes VmInventory.qemuVersion of the VMs started with it. */
  readonly version: string;
  readonly machines: readonly string[];
}

/** What a spec's devices mean. The devices of an existing VM are in its `facts`. */
export interface SpecDevices {
  /** Devices whose state cannot be moved. QEMU reports them only when a migration starts. */
  readonly withoutState: readonly string[];
  /** Devices by which processes other than the VM's own write to guest memory. */
  readonly escaping: readonly string[];
  /** Devices by which the guest gives pages back to the host. */
  readonly discarding: readonly string[];
  /** What only one process of a host can have. */
  readonly hostResources: readonly HostResource[];
  /** False if the guest certainly finds nothing to boot from. */
  readonly hasBootSource: boolean;
}

/** The paths of a VM's files. All paths are absolute. Those of sockets are in `directory`. */
export interface VmPlace {
  readonly name: string;
  /** The VM's own directory. It is removed with the VM. */
  readonly directory: string;
  /**
   * Where the process makes its sockets. The directory itself, or one below it that belongs to the user of a contained
   * process, which may put anything there: nobody else follows a link or opens a file in it.
   */
  readonly socketDirectory: string;
  /**
   * The serial port's socket, if the spec has a serial port. It serves one connection. The log has the latest output:
   * a back end bounds it, and keeps older output in `serialLogPath.1` and so on.
   */
  readonly serialPath: string;
  readonly serialLogPath: string;
  /** The file that received the guest's output on its exit port in VMs that an earlier build has started. */
  readonly exitPath: string;
  /** The socket of the guest agent's port, if the spec has one. */
  readonly agentPath: string;
  /** The output of the process itself, bounded as the serial log is. */
  readonly outputPath: string;
}

export interface Command {
  readonly program: string;
  readonly args: readonly string[];
  /** All variables of the process except PATH. */
  readonly environment: Readonly<Record<string, string>>;
}

/** What bounds a process beside its own rights. */
export interface Container {
  /** The user that the process runs as, and the group of the same number. */
  readonly uid: number;
  /** Directories of cgroups that the process joins. They exist. */
  readonly cgroups: readonly string[];
  /** Taps that are made for the process in its own network namespace. Others exist, and belong to the user. */
  readonly taps: readonly string[];
  /** The process makes userfaultfds not only for the preload at its start, but later, for its own post-copy. */
  readonly hasPostcopy: boolean;
  /** Directories with sockets of the daemon to which the process connects. */
  readonly socketDirectories: readonly string[];
}

export interface LaunchOrder {
  readonly spec: VmSpec;
  readonly accel: Accel;
  /** One path per region, in the spec's order, if the VM's memory is in files. The files exist. */
  readonly ramPaths: readonly string[];
  /**
   * The tap device of each NIC that has one, by the NIC's id. In a VM with isolated NICs the process makes the taps,
   * unless it is contained.
   */
  readonly taps: Readonly<Record<string, string>>;
  /** True if the VM waits for the state of another VM: by `importState`, or by `loadFile` if `statePath` is given. */
  readonly isIncoming: boolean;
  /** The file that `loadFile` will read. The launch opens it; the agent writes it before `loadFile`. */
  readonly statePath?: string;
  /** Of each disk that another host serves (`DiskSpec.served`), by its id: the socket that leads there. */
  readonly diskSockets?: Readonly<Record<string, string>>;
  /** Null: the process has the daemon's rights. The places of its sockets follow from that, see VmPlace. */
  readonly container: Container | null;
  /** The variables of the preload. */
  readonly environment: Readonly<Record<string, string>>;
  /** Wraps the command so that it runs in the VM's own network namespace, if it has one. */
  readonly enclose: (command: Command) => Command;
  /** Called at once, while the process has a single thread. */
  readonly onSpawned: (pid: number) => void;
}

/** A VM whose process has been started. The caller records `identity` before it continues. */
export interface StartedVm {
  readonly identity: ProcessIdentity;
  /** Never rejects. */
  readonly exited: Promise<ChildExit>;
  /**
   * Resolves when the VM is connected and paused. No vCPU has run. The call first awaits `mapped`, which resolves when
   * all memory is mapped; its signal aborts when the result is no longer needed. Throws QEMU_FAILED with the process's
   * own message if the process has exited, CANCELLED if `signal` aborts. The caller ends the process.
   */
  ready(mapped: (signal: AbortSignal) => Promise<void>, signal: AbortSignal): Promise<void>;
}

export type RunState = 'running' | 'paused';

/** `shutdown`, `panicked`: the guest has ended, and its process only waits for the daemon. */
export type ConnectedState = RunState | 'shutdown' | 'panicked';

export interface VmListener {
  /** Called when the vCPUs have been stopped or resumed, whoever has asked for it. */
  onRunState(state: RunState): void;
  /**
   * Called when the VM is about to end, or when its guest has ended and the process waits for `quit`. `reason` is the
   * back end's word, or `panicked`. `isPowerOff`: the guest has powered itself off.
   */
  onShutdown(reason: string, isPowerOff: boolean): void;
  /** Called when the guest has opened or closed its exit port, at most about once a second. */
  onExitPort(): void;
  /** Called once per connection when it is lost, also if that was before `follow`. The process may still be alive. */
  onLost(): void;
}

/** One VM. Its methods may be called concurrently unless a method says otherwise. */
export interface VmProcess {
  /** Allowed once, on a new VmProcess. Throws QEMU_FAILED if the program cannot be started. */
  launch(order: LaunchOrder): Promise<StartedVm>;
  /** Connects to a process of an earlier daemon, or again after a loss of the connection. One call at a time. */
  connect(): Promise<ConnectedState>;
  /** Waits up to 10 s for a connection, then throws QEMU_GONE. It throws at once if the VmProcess is new or closed. */
  connected(): Promise<void>;
  /** Reports the events of the current connection. It must be called again after each `connect`. */
  follow(listener: VmListener): void;
  /** Closes the connection for good. The process keeps running. Idempotent. */
  close(): void;

  /** Runs the vCPUs. Not allowed during an export or import of state, which have a `run` or `resume` of their own. */
  run(): Promise<void>;
  pause(): Promise<void>;
  /** Presses the guest's power button. The guest may ignore it. */
  powerdown(): Promise<void>;
  /** Restarts the guest, as its reset button does. */
  reset(): Promise<void>;
  /** Ends the process, whatever its guest does. */
  quit(): Promise<void>;
  /**
   * Takes what the guest has written to its exit port since the last call: the last 4 KiB at most. `isOpen`: the guest
   * has the port open now. The process keeps the text until it is taken, also while no daemon runs.
   */
  takeExitText(): Promise<{ readonly text: string; readonly isOpen: boolean }>;
  /** Waits up to a second until the logs of an ended process have all of its output. Needs no connection. */
  outputKept(): Promise<void>;
  /** Returns `error`, with the last output of the process if it has ended. */
  explain(error: unknown): Promise<MigrationError>;

  readonly facts: VmFacts;
  readonly disks: VmDisks;
  /** Throws TIMEOUT if the guest does not release a NIC. The guest keeps running without that network. Idempotent. */
  replaceNics(order: NicOrder): Promise<void>;
  /** Throws TIMEOUT if no agent answers in the guest. The caller closes the link. Needs no connection. */
  guestAgent(timeoutMs: number): Promise<GuestAgentLink>;
  /** Announces the guest's addresses to switches and peers, several times. */
  announce(): Promise<void>;

  /** Prepares the export of the device state, for an outgoing VM or a fork. The VM keeps running. */
  exportState(): Promise<StateExport>;
  /**
   * Makes the import of a VM's state, at most one per process. The process was launched as incoming. `isReattached` is
   * true if an earlier daemon launched it. Then the process may not be connected yet, and is not queried before an
   * answer is needed.
   */
  importState(mode: MigrationMode, isReattached: boolean): StateImport;
  /** Does everything for `loadFile` that does not need the state, long before it. */
  prepareFile(): Promise<void>;
  /** Makes the load of the state from the launch's `statePath`. `loaded` starts it. */
  loadFile(): FileLoad;
  /** Returns how far that load is, also one of an earlier daemon. It waits as `connected` does. */
  loadState(): Promise<LoadState>;
  /**
   * Runs the vCPUs after a load, also one of an earlier daemon. Does nothing if they have run. Throws CONFLICT if the
   * state is not loaded. It waits as `connected` does.
   */
  runLoaded(): Promise<void>;

  /**
   * Runs the back end's own migration, for VMs whose RAM the pager does not move. Resolves when the VM is stopped on
   * this host and everything that the target needs to run it has been sent: all of it (pre-copy), or the device state
   * (post-copy). If it fails before, the VM resumes on this host by itself.
   */
  nativeMove(order: NativeMoveOrder): Promise<void>;
  /** Goes on with a post-copy whose stream was lost. Resolves when pages are sent again. */
  nativeRecover(open: OpenStream): Promise<void>;
  /** Returns the progress. The keys are those of src/engine/ports. It waits as `connected` does. */
  nativeReading(): Promise<Readonly<Record<string, number | string>>>;
  /** Cancels any migration that can still be cancelled. Idempotent. It waits as `connected` does. */
  cancelMove(): Promise<void>;
  /**
   * Cancels the VM's migration and resumes the VM on this host. The caller has made sure that the VM may run here.
   * Idempotent. It waits as `connected` does.
   */
  cancelAndRun(): Promise<void>;
}

export interface VmFacts {
  /** Returns the reasons against a migration, and the devices that post-copy cannot serve. */
  migrationBlockers(): Promise<string[]>;
  /** Returns the devices by which the guest gives pages back to the host. */
  discardingDevices(): Promise<string[]>;
  /** The names of block nodes whose reads go past the host's page cache, straight into the guest's memory. */
  directDisks(): Promise<string[]>;
  /** Returns the ids of the memory regions that are mapped so that writes go to their files. */
  sharedRegions(): Promise<ReadonlySet<string>>;
  /** Returns how the devices differ from those that `spec`, with which the VM was started, has made. */
  deviceChanges(spec: VmSpec): Promise<readonly string[]>;
  /** Returns the files of all drives, also of those that no spec names. */
  openFiles(): Promise<readonly OpenFile[]>;
  /** True if the VM is paused because a disk could not be read or written, for another reason than a lack of space. */
  isStoppedByDisk(): Promise<boolean>;
}

export interface NicOrder {
  /** The spec that the VM was started with. */
  readonly spec: VmSpec;
  /** The NICs that the VM is to have: the same ids in the same order. */
  readonly nics: readonly NicSpec[];
  /** Called when the new NIC is plugged in and not connected. Its tap may join a bridge then. */
  readonly onPresent: (nic: NicSpec) => Promise<void>;
  /** The time that the guest may take for each NIC. Default 120 s. */
  readonly unplugTimeoutMs?: number;
}

/** Runs one command at a time. Throws QEMU_FAILED if the agent refuses, QEMU_GONE if its port is closed. */
export interface GuestAgentLink {
  /** Sets the guest's wall clock, ms since 1970. */
  setTime(timeMs: number): Promise<void>;
  timeMs(): Promise<number>;
  /** Runs a program in the guest until it ends. Throws QEMU_FAILED if its exit code is not 0. */
  run(path: string, args: readonly string[], timeoutMs: number): Promise<void>;
  /** Idempotent. */
  close(): void;
}

export type StateStream = Readable & { readonly bytesRead: number };

/** Sends the stream to its destination. Resolves with its length when all of it has arrived. */
export type StateConsumer = (stream: StateStream) => Promise<number>;

/**
 * A stream of device state. It starts while the VM still runs, so that only the device state itself is saved while the
 * VM is stopped. If the stream breaks before it is complete, the VM resumes by itself. After that it never does.
 *
 *   stop ──► transfer ──► (resume)            end, after which stop may come again            close
 */
export interface StateExport {
  /** Resolves when the VM is stopped and its disks are drained. The VM runs during most of this call. */
  stop(consume: StateConsumer): Promise<{ readonly stoppedAtUs: number }>;
  /**
   * Resolves when the consumer has the whole stream and the VM has finished sending. `doneAtMs` is the time of the
   * latter, by performance.now(). It may be earlier.
   */
  transfer(): Promise<{ readonly deviceStateBytes: number; readonly doneAtMs: number }>;
  /** Resumes the VM after `transfer`. Resolves with the time, in µs. Throws CANCELLED if the attempt has ended. */
  resume(): Promise<number>;
  /** Ends the attempt at any point. Pending calls reject with CANCELLED. Idempotent. */
  end(): void;
  /** Idempotent. */
  close(): Promise<void>;
}

/** The progress of memory that the back end's own post-copy brings. */
export type NativeArrival = 'filling' | 'complete' | 'failed';

/**
 *   listen ──► accept ──► loaded ──► attach ──► readyToRun ──► (the answer is called: the VM runs)
 *
 * `accept` is only for modes whose memory is moved by the pager: their device state comes through the daemon.
 */
export interface StateImport {
  /** Waits for the stream: of the device state, or of the back end's own migration. Call it once. */
  listen(): Promise<void>;
  /** Connects to what waits for the back end's own migration. Throws CONFLICT if nothing does. */
  openStream(): Promise<Duplex>;
  /** The same after a loss while pages of the running VM are still on the way. */
  reopenStream(): Promise<Duplex>;
  /**
   * Loads `body`. Resolves when all of it is loaded. Throws CONFLICT if no state is expected or one has been accepted.
   */
  accept(body: Readable): Promise<void>;
  /** True if the whole state is known to be loaded. */
  readonly isLoaded: boolean;
  /** Resolves when the whole state is loaded. Throws QEMU_FAILED if the process ends meanwhile. */
  loaded(): Promise<void>;
  /** Queries the progress of an earlier daemon's process. Returns null at once for any other process. */
  attach(): Promise<void> | null;
  /**
   * Called after `attach`, before this host takes the ownership. Throws CONFLICT if the state is not fully loaded,
   * QEMU_GONE if the process is not connected. The returned function resumes the VM at once and resolves with the time,
   * in
   * µs.
   */
  readyToRun(): () => Promise<number>;
  /** The progress of a running VM whose memory the back end moves. */
  nativeArrival(): Promise<NativeArrival>;
  /** Pending calls reject with `error`. Idempotent. */
  end(error: MigrationError): void;
}

/** `loaded`: no vCPU has run. `hasRun` also holds for a guest that has been stopped since, or has ended. */
export type LoadState = 'waiting' | 'loaded' | 'hasRun';

/** Loads the state of an image into a clone. */
export interface FileLoad {
  /** Starts the load and resolves when the whole state is loaded. Call it once. */
  loaded(): Promise<void>;
  /** Runs the vCPUs after `loaded`. Resolves when they run. */
  run(): Promise<void>;
  /** Pending calls reject with CANCELLED. The VM is left as it is. Idempotent. */
  end(): void;
}

/** Connects to the target's `StateImport.openStream`. */
export type OpenStream = () => Promise<Duplex>;

export interface NativeMoveOrder {
  readonly open: OpenStream;
  /** Once it is aborted, the migration does not begin. */
  readonly signal: AbortSignal;
  readonly isPostcopy: boolean;
  /** 0: no limit. */
  readonly bandwidthBytesPerS: number;
  readonly downtimeMsMax: number;
}

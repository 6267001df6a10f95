/**
 * The VMs of this host. Each has a directory `STATE/vms/NAME` with its record, sockets and logs. VMs outlive the
 * daemon: `close` leaves them running, and `start` finds them again.
 *
 * Order of a start: record (durable) → owner → region files, taps → process → connection to it → record. The record
 * alone is enough to find what a crash has left. Order of an end: process → region files, taps → owner → directory.
 *
 * A new daemon removes a VM in state `starting`, because its start was never reported to a user. It keeps a VM in state
 * `incoming`; LocalAgent destroys that VM if no session claims it (`ManagedVm.session`).
 */
import { readdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { RunState, VmBackend } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { GuestEnd } from '../../domain/guest-end.js';
import type { VmExit, VmSpec, VmState, VmView } from '../../domain/vm.js';
import { makeDirectoryDurably } from '../../durable/durable-file.js';
import { Reserve } from '../../durable/reserve.js';
import { VmCgroups } from '../contain/cgroups.js';
import { adopt } from './adopt.js';
import { type StopOptions, VmKeeper } from './keeper.js';
import { MemoryRoom, ownBytesOf, promisesOf } from './memory-room.js';
import type { CloneOptions, IncomingOptions, VmManagerOptions } from './options.js';
import { presencePath } from './ram-files.js';
import { RamPlace } from './ram-place.js';
import { effectiveState, type RecordAmendment, readRecord, reservedBy, type VmRecord } from './record.js';
import { VmStarter } from './starts.js';
import { notOurs, VmTable } from './table.js';
import { describeUnreadable, noRecord, strayIn } from './unreadable.js';
import { type ManagedVm, placeIn, stopForGood, Vm, viewOf, whilePaused } from './vm.js';

export type { VmExit } from '../../domain/vm.js';
export type { ManagedVm } from './vm.js';

/** The reason in the exit of a clone that was ended because clones had written too much. */
const OUT_OF_MEMORY = 'memory';
/** How long the QEMU of an ended guest may take to end. */
const GUEST_END_MS = 5_000;

export class VmManager {
  readonly #options: VmManagerOptions;
  readonly #table: VmTable;
  readonly #keeper: VmKeeper;
  readonly #starter: VmStarter;
  readonly place: RamPlace;
  /** The memory of this host, which VMs and images share. */
  readonly room: MemoryRoom;
  #isClosed = false;

  constructor(options: VmManagerOptions) {
    const { host, ramDir, memoryId: ownerId, registry, log } = options;
    this.#options = options;
    this.place = new RamPlace({ host, ramDir, ownerId });
    this.#table = new VmTable(host, join(options.stateDir, 'vms'));
    this.room = new MemoryRoom(this.place, options.memory);
    this.room.addHolder(() => promisesOf(this.#table.all()));
    const cgroups = VmCgroups.open(host, options.stateDir);
    const shared = { place: this.place, table: this.#table, cgroups };
    this.#keeper = new VmKeeper({ ...shared, host, registry, log });
    this.#starter = new VmStarter(options, { ...shared, keeper: this.#keeper, room: this.room });
  }

  /**
   * Finds the VMs of an earlier daemon and reattaches to them. If that fails for one VM, the error is logged and the
   * others are adopted all the same.
   */
  async start(): Promise<void> {
    await makeDirectoryDurably(this.#table.directory);
    await this.place.inRamDir(() => Promise.resolve());
    const find = (name: string) => this.#table.locks.hold(name, () => this.#find(name));
    // A VM whose directory is gone, for example because a backup came back, still has its memory and its process.
    const withMemory = (await readdir(this.#options.ramDir)).filter((name) => !name.startsWith('.'));
    await Promise.all([...new Set([...(await readdir(this.#table.directory)), ...withMemory])].map(find));
  }

  /** Starts a VM at an epoch above `epochMin`. If it rejects, it removes everything of the VM. */
  async run(spec: VmSpec, options: { epochMin?: number } = {}): Promise<VmView> {
    return viewOf(await this.#starter.run(spec, options.epochMin ?? 0), this.#options.host);
  }

  /**
   * Starts a process that waits for the state of a VM on another host: its regions are mapped and registered, and it is
   * ready for `importState`. A second call for the same session returns the same VM. Throws CONFLICT if the name is
   * taken.
   */
  prepareIncoming(spec: VmSpec, options: IncomingOptions): Promise<ManagedVm> {
    return this.#starter.prepareIncoming(spec, options);
  }

  /**
   * Starts a process that waits for the state of an image. It also writes the owner record, so nothing has to be
   * written before the VM may run. If it rejects, it removes everything of the VM. Throws CONFLICT if the name is
   * taken.
   */
  prepareClone(spec: VmSpec, options: CloneOptions): Promise<ManagedVm> {
    return this.#starter.prepareClone(spec, options);
  }

  /** Throws NOT_FOUND if this host has no such VM. */
  get(name: string): ManagedVm {
    return this.#table.get(name);
  }

  has(name: string): boolean {
    return this.#table.has(name);
  }

  /** True if this host has a VM of this name, also one whose record cannot be read. */
  isTaken(name: string): boolean {
    return this.has(name) || this.unreadable().some((vm) => vm.name === name);
  }

  /** The VMs whose record cannot be read. */
  unreadable(): readonly VmView[] {
    return this.#table.unreadable().map(({ view }) => view);
  }

  all(): readonly ManagedVm[] {
    return this.#table.all();
  }

  list(): VmView[] {
    return [...this.all().map((vm) => this.view(vm)), ...this.unreadable()].sort((a, b) => (a.name < b.name ? -1 : 1));
  }

  view(vm: ManagedVm): VmView {
    return viewOf(this.#table.get(vm.spec.name), this.#options.host);
  }

  /** Returns the exit of a stopped VM. */
  exitOf(name: string): VmExit | null {
    return this.#table.get(name).record.exit;
  }

  /** Returns the exit code that the guest has written so far, now or before it came here. */
  async exitCode(name: string): Promise<number | null> {
    const vm = this.#table.get(name);
    await vm.exitWatch?.drain();
    return this.view(vm).exitCode;
  }

  /**
   * Returns how the guest of a VM has ended by itself, or null. Its QEMU may take a moment longer; the call waits for
   * that, so the VM's exit is recorded then.
   */
  async guestEnd(name: string): Promise<GuestEnd | null> {
    const vm = this.#table.get(name);
    if (vm.guestEnd !== null) await this.#table.untilEnded(vm, GUEST_END_MS);
    return vm.guestEnd;
  }

  /** Returns the directory for the files of a VM of this name, which need not exist. */
  directoryOf(name: string): string {
    return join(this.#table.directory, name);
  }

  /** The room for new work on the state disk. Undefined if the state directory has no reserve, as in some tests. */
  async stateFreeBytes(): Promise<number | undefined> {
    return Reserve.for(this.#table.directory)?.freeBytes();
  }

  presencePath(name: string, regionId: string): string {
    return presencePath(this.place, name, regionId);
  }

  /** The serial port's socket and log, for console.ts. */
  serialPaths(name: string): { socket: string; log: string } {
    const vm = this.#table.get(name);
    if (!vm.spec.hasSerial) throw new MigrationError('CONFLICT', `${name} has no serial port`);
    return { socket: vm.place.serialPath, log: vm.place.serialLogPath };
  }

  /** The back end that runs the VMs of this host. */
  get backend(): VmBackend {
    return this.#options.backend;
  }

  /** Durable when it resolves. */
  async setState(name: string, state: VmState, options: { epoch?: number } = {}): Promise<void> {
    const vm = this.#table.get(name);
    await vm.update((record) => ({ state: effectiveState(record, state), ...options }));
    this.#table.changed(vm);
  }

  /**
   * Records a change that has already taken place: the files of the VM's disks, or the image of its memory. Durable
   * when it resolves.
   */
  async amend(name: string, change: (record: VmRecord) => RecordAmendment | null): Promise<void> {
    await this.#table.get(name).update(change);
    this.#table.changed(this.#table.get(name));
  }

  /** Reserves the VM for a job. Throws VM_BUSY if another job has it. Idempotent, durable. */
  async reserve(name: string, job: string): Promise<void> {
    const vm = this.#table.get(name);
    await vm.update((record) => reservedBy(record, job));
    this.#table.changed(vm);
  }

  /** Removes the job's reservation. Does nothing if another job has the VM or if the VM is gone. */
  async unreserve(name: string, job: string): Promise<void> {
    const vm = this.#table.find(name);
    if (vm === undefined) return;
    await vm.update((record) => (record.job === job ? { job: null } : null));
    this.#table.changed(vm);
  }

  /**
   * Removes the VM and everything that belongs to it, also while it starts. Idempotent. A VM that gets the name
   * meanwhile is left alone.
   */
  async destroy(name: string): Promise<void> {
    const vm = this.#table.find(name);
    vm?.start.abort();
    await this.#table.locks.hold(name, async () => {
      if (vm !== undefined && this.#table.find(name) === vm) await this.#keeper.remove(vm);
    });
  }

  pause(name: string): Promise<void> {
    return this.#setRunState(name, 'paused');
  }

  resume(name: string): Promise<void> {
    return this.#setRunState(name, 'running');
  }

  async #setRunState(name: string, state: RunState): Promise<void> {
    const { process } = this.#table.get(name);
    await process.connected().catch(() => undefined);
    await this.#table.locks.hold(name, async () => {
      const vm = await this.#checkUsable(name, ['running', 'paused']);
      if (state === 'running') vm.refuseToRun();
      await (state === 'running' ? vm.process.run() : vm.process.pause());
      vm.liveState = state;
      await vm.update({ state });
      this.#table.changed(vm);
    });
  }

  /** Pauses a running VM for `work`. If that rejects, it stays paused and held. A user's call waits meanwhile. */
  whilePaused<T>(name: string, work: () => Promise<T>): Promise<T> {
    return this.#table.locks.hold(name, () => whilePaused(this.#table.get(name), work));
  }

  /** Lets the VM run if `work` allows it and its user has not paused it. A user's call for it waits meanwhile. */
  restoreRunState(name: string, work: () => Promise<boolean>): Promise<void> {
    return this.#table.locks.hold(name, () => this.#table.get(name).restoreRunState(work));
  }

  /**
   * Presses the guest's power button and waits for the guest to end, at most `timeoutMs`. Returns false if it did not;
   * it runs on then. A guest that does not run is not waited for. Other calls for the VM are allowed meanwhile, so a
   * forced stop ends the wait.
   */
  async shutDown(name: string, timeoutMs: number): Promise<boolean> {
    const vm = await this.#checkUsable(name, ['running', 'paused']);
    if (vm.state !== 'running') return false;
    await vm.process.powerdown();
    return this.#table.untilEnded(vm, timeoutMs);
  }

  /** Restarts the guest, as its reset button does. Throws UNSUPPORTED for a clone whose kernel QEMU has not loaded. */
  async reset(name: string): Promise<void> {
    await this.#table.locks.hold(name, async () => {
      const vm = await this.#checkUsable(name, ['running', 'paused']);
      if (vm.spec.clone !== undefined && vm.spec.kernel !== undefined) {
        throw new MigrationError('UNSUPPORTED', `${name} is a clone, and has no kernel to start again with`, {
          remedy: `"vmctl stop ${name}" ends it; make another with "vfork --image ${vm.image ?? 'ID'}"`,
        });
      }
      await vm.process.reset();
    });
  }

  /**
   * Ends QEMU and frees the memory. The VM stays listed as stopped until it is stopped again or its name is used again.
   * A departed VM is removed at once, but not while a job has it, even by force: its new host may still need its
   * memory. By force, a VM is ended that has never run and that nobody needs: what a failed job could not undo.
   */
  async stop(name: string, options: StopOptions): Promise<void> {
    await this.#table.locks.hold(name, async () => {
      if (options.only !== undefined && options.only !== this.#table.find(name)) return;
      const { job, state, image } = this.#table.get(name);
      const states: VmState[] = ['running', 'paused', 'stopped', ...(job === null ? ['departed' as const] : [])];
      if ((state === 'incoming' || state === 'starting') && options.isForced && options.isUnclaimed === true) {
        if (image === null) return this.#keeper.remove(this.#table.get(name));
        states.push(state);
      }
      const vm = await this.#checkUsable(name, states, options.isForced);
      if (vm.isOver) return this.#keeper.remove(vm);
      vm.isEnding = true;
      await this.#keeper.end(vm, options);
      await this.#keeper.settle(vm, options.reason ?? 'stopped');
    });
  }

  /** The running clones that share an image, oldest first, with the memory that each has written for itself. */
  clonesWriting(): { readonly name: string; readonly ownBytes: number }[] {
    return this.#table
      .all()
      .filter((vm) => vm.spec.memory.backing === 'image' && (vm.state === 'running' || vm.state === 'paused'))
      .sort((a, b) => (a.record.createdAt < b.record.createdAt ? -1 : 1))
      .map((vm) => ({ name: vm.spec.name, ownBytes: ownBytesOf(vm) }));
  }

  /** Ends a clone for which there is no memory. It stays listed, with that reason. */
  async endForMemory(name: string): Promise<void> {
    const vm = this.#table.find(name);
    if (vm?.spec.memory.backing === 'image') await this.endClone(vm, OUT_OF_MEMORY);
  }

  /** Pauses a VM for good whose memory is damaged; a user ends it. Durable when it resolves. Idempotent. */
  markDamaged(damaged: ManagedVm, damage: string): Promise<void> {
    return this.#onLiving(damaged, (vm) => stopForGood(vm, damage).finally(() => this.#table.changed(vm)));
  }

  /** Kills a clone, also one that has not run yet. It stays listed, with that reason. Idempotent. */
  endClone(clone: ManagedVm, reason: string): Promise<void> {
    return this.#onLiving(clone, async (vm) => {
      vm.isEnding = true;
      await this.#keeper.end(vm, { isForced: true });
      await this.#keeper.settle(vm, reason);
    });
  }

  /** Does nothing for a clone that has ended, or whose name another VM has. */
  #onLiving(clone: ManagedVm, work: (vm: Vm) => Promise<void>): Promise<void> {
    return this.#table.locks.hold(clone.spec.name, async () => {
      const vm = this.#table.find(clone.spec.name);
      if (vm === clone && vm !== undefined && !vm.isOver) await work(vm);
    });
  }

  on(event: 'exit', listener: (name: string, info: VmExit) => void): void;
  on(event: 'change', listener: (name: string) => void): void;
  on(event: 'exit' | 'change', listener: (...args: never[]) => void): void {
    this.#table.on(event, listener);
  }

  off(event: 'exit' | 'change', listener: (...args: never[]) => void): void {
    this.#table.off(event, listener);
  }

  /** Called when the daemon exits. QEMUs keep running. The sessions on the VMs' memory must be closed before. */
  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#starter.close();
    this.#keeper.close();
    for (const vm of this.#table.all()) vm.start.abort();
    await Promise.all(this.#table.all().map((vm) => this.#table.locks.hold(vm.spec.name, () => Promise.resolve())));
    for (const vm of this.#table.all()) await vm.close();
    await this.place.close();
  }

  /** Checks for a user's call that the VM is in one of these states, belongs to this host, and is in no job. */
  async #checkUsable(name: string, states: readonly VmState[], isJobIgnored = false): Promise<Vm> {
    const vm = this.#table.get(name);
    if (vm.job !== null && !isJobIgnored) {
      throw new MigrationError('VM_BUSY', `${name} is part of job ${vm.job}`, {
        remedy: `wait until it has ended: "vmctl job ${vm.job} --follow"`,
      });
    }
    if (!states.includes(vm.state)) throw new MigrationError('CONFLICT', `${name} is ${vm.state}`);
    if (isJobIgnored || vm.isOver) return vm; // Force ends a process of this host, whatever the records say.
    const owner = await this.#options.registry.owner(name);
    if (owner?.owner !== this.#options.host || owner.epoch !== vm.epoch) throw notOurs(vm, owner, this.#options.host);
    return vm;
  }

  async #find(name: string): Promise<void> {
    const directory = join(this.#table.directory, name);
    try {
      const record = await readRecord(directory);
      if (record === null) {
        // A crash came before the first record, so the VM had no process. One that runs has lost its record.
        const [stray] = await strayIn(directory, name, this.#options.backend);
        if (stray !== undefined) throw noRecord(directory, stray.pid);
        await rm(directory, { recursive: true, force: true });
        return;
      }
      if (record.spec.name !== name) throw new MigrationError('CORRUPT', `${directory} holds the record of another VM`);
      const vm = new Vm(directory, record, this.#options.backend);
      this.#table.add(vm);
      const { native, log } = this.#options;
      if ((await adopt(vm, { keeper: this.#keeper, native, log })) === 'unwanted') await this.#keeper.remove(vm);
    } catch (error) {
      const place = placeIn(directory, name, false);
      if (!this.#table.has(name))
        this.#table.addUnreadable(await describeUnreadable(place, toMigrationError(error), this.#options));
      this.#options.log.error(
        { vm: name, error: toMigrationError(error).toJSON() },
        `the VM in ${directory} cannot be adopted`,
      );
    }
  }
}

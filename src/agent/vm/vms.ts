/**
 * The VMs of this host. Each has a directory `STATE/vms/NAME` with its record, sockets and logs. QEMU processes outlive
 * the daemon: `close` lets them be, `start` finds them again.
 *
 * Order of a start: record (durable) → owner → region files, taps → QEMU → QMP → record. Whatever a crash leaves is
 * found by the record alone. Order of an end: QEMU → region files, taps → owner → directory.
 *
 * A VM in state `starting` that a new daemon finds is removed: nobody was told that it runs. One in state `incoming` is
 * kept; LocalAgent knows whether a session still claims it (`ManagedVm.session`) and destroys it if not.
 */
import { EventEmitter } from 'node:events';
import { mkdir, readdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { askQemu, type InstalledQemu, resolveAccel } from '../../backends/qemu/installed.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { VmExit, VmSpec, VmState, VmView } from '../../domain/vm.js';
import { KeyedLocks } from '../../kit/locks.js';
import { checkSpec } from '../../schemas/vm-spec.js';
import { adopt } from './adopt.js';
import { connectedQmp } from './connected-qmp.js';
import { type BringUpOptions, bringUp, createVm, type VmStart } from './create.js';
import { type StopOptions, VmKeeper } from './keeper.js';
import type { CloneOptions, IncomingOptions, VmManagerOptions } from './options.js';
import { presencePath, type RamPlace } from './ram-files.js';
import { heldAgainst, type RecordAmendment, readRecord, reservedBy, type VmRecord } from './record.js';
import { identityDueOf } from './settle-in.js';
import { type ManagedVm, Vm, viewOf } from './vm.js';

export type { VmExit } from '../../domain/vm.js';
export type { ManagedVm } from './vm.js';

export class VmManager {
  readonly #options: VmManagerOptions;
  readonly #place: RamPlace;
  readonly #directory: string;
  readonly #vms = new Map<string, Vm>();
  /** Names whose directory holds a record that cannot be read: taken until someone looks. */
  readonly #unreadable = new Set<string>();
  readonly #locks = new KeyedLocks();
  readonly #emitter = new EventEmitter();
  readonly #keeper: VmKeeper;
  #qemu: Promise<InstalledQemu> | null = null;
  #isClosed = false;

  constructor(options: VmManagerOptions) {
    this.#options = options;
    this.#place = { host: options.host, ramDir: options.ramDir };
    this.#directory = join(options.stateDir, 'vms');
    this.#emitter.setMaxListeners(0);
    const { host, registry, log } = options;
    this.#keeper = new VmKeeper({
      host,
      place: this.#place,
      registry,
      log,
      locks: this.#locks,
      emitter: this.#emitter,
    });
  }

  /**
   * Finds the VMs of an earlier daemon again. One that cannot be taken up is logged and does not keep the others from
   * it.
   */
  async start(): Promise<void> {
    await mkdir(this.#directory, { recursive: true, mode: 0o700 });
    await mkdir(this.#options.ramDir, { recursive: true, mode: 0o700 });
    const find = (name: string) => this.#locks.hold(name, () => this.#find(name));
    await Promise.all((await readdir(this.#directory)).map(find));
  }

  /** Starts a VM. When it rejects, nothing is left of it. */
  async run(input: VmSpec): Promise<VmView> {
    const spec = checkSpec(input);
    return this.#locks.hold(spec.name, async () => {
      await this.#clearName(spec.name);
      const accel = await resolveAccel(spec.accel === 'auto' ? this.#options.accel : spec.accel);
      const before = await this.#options.registry.owner(spec.name);
      const epoch = (await this.#options.registry.lastEpoch(spec.name)) + 1;
      const vm = await this.#create(spec, { state: 'starting', epoch, accel, session: null });
      await this.#orNothing(vm, async () => {
        const owner = { vm: spec.name, owner: this.#options.host, epoch, session: null };
        await this.#options.registry.swapOwner(spec.name, before?.epoch ?? null, owner);
        await this.#launch(vm, { isIncoming: false });
        await vm.qmp.execute('cont');
        await vm.update({ state: 'running' });
      });
      return this.view(vm);
    });
  }

  /**
   * A QEMU that waits for the state of a VM on another host (-incoming defer): regions mapped and registered, ready for
   * `migrate-incoming`. Repeating it for the same session returns the same VM. CONFLICT if the name is taken.
   */
  async prepareIncoming(input: VmSpec, options: IncomingOptions): Promise<ManagedVm> {
    const spec = checkSpec(input);
    return this.#locks.hold(spec.name, async () => {
      const existing = this.#vms.get(spec.name);
      if (existing?.state === 'incoming' && existing.session === options.session) return existing;
      await this.#clearName(spec.name);
      const owner = await this.#options.registry.owner(spec.name);
      if (owner !== null && owner.epoch >= options.epoch) {
        throw new MigrationError(
          'OWNER_CHANGED',
          `${spec.name} has epoch ${owner.epoch} here, ${options.epoch} is not newer`,
        );
      }
      const accel = await resolveAccel(options.accel);
      const vm = await this.#create(spec, { state: 'incoming', epoch: options.epoch, accel, session: options.session });
      vm.giveUpOn(options.signal);
      return this.#orNothing(vm, () =>
        this.#launch(vm, { isIncoming: true, hasPreload: spec.hasPreload && options.isNative !== true }),
      );
    });
  }

  /**
   * A QEMU that waits for the state of an image. Its owner record is there as well: nothing of the VM has to be written
   * before it may run. When it rejects, nothing is left. CONFLICT if the name is taken.
   */
  async prepareClone(input: VmSpec, options: CloneOptions): Promise<ManagedVm> {
    const spec = checkSpec(input);
    return this.#locks.hold(spec.name, async () => {
      await this.#clearName(spec.name);
      const { registry, host } = this.#options;
      const before = await registry.owner(spec.name);
      const epoch = (await registry.lastEpoch(spec.name)) + 1;
      const { image, accel, isRegistered, statePath } = options;
      const identityDue = identityDueOf(spec, options.nics);
      const vm = await this.#create(spec, { state: 'incoming', epoch, accel, session: null, image, ...identityDue });
      vm.giveUpOn(options.signal);
      return this.#orNothing(vm, async () => {
        await registry.swapOwner(spec.name, before?.epoch ?? null, {
          vm: spec.name,
          owner: host,
          epoch,
          session: null,
        });
        await options.beforeLaunch();
        await this.#launch(vm, { isIncoming: true, isRegistered, inputPaths: [statePath] });
      });
    });
  }

  /** NOT_FOUND if there is none. */
  get(name: string): ManagedVm {
    return this.#get(name);
  }

  has(name: string): boolean {
    return this.#vms.has(name);
  }

  all(): readonly ManagedVm[] {
    return [...this.#vms.values()];
  }

  list(): VmView[] {
    return this.all()
      .map((vm) => this.view(vm))
      .sort((a, b) => (a.name < b.name ? -1 : 1));
  }

  view(vm: ManagedVm): VmView {
    return viewOf(this.#get(vm.spec.name), this.#options.host);
  }

  /** How a stopped VM came to its end. */
  exitOf(name: string): VmExit | null {
    return this.#get(name).record.exit;
  }

  /** Where a VM of this name has its files, or would have them. */
  directoryOf(name: string): string {
    return join(this.#directory, name);
  }

  presencePath(name: string, regionId: string): string {
    return presencePath(this.#place, name, regionId);
  }

  /** The serial port's socket and log, for console.ts. */
  serialPaths(name: string): { socket: string; log: string } {
    const vm = this.#get(name);
    if (!vm.spec.hasSerial) throw new MigrationError('CONFLICT', `${name} has no serial port`);
    return { socket: vm.paths.serial, log: vm.paths.serialLog };
  }

  /** The installed QEMU; asked once. UNSUPPORTED if there is none. */
  qemu(): Promise<InstalledQemu> {
    this.#qemu ??= askQemu(this.#options.qemuProgram ?? 'qemu-system-x86_64').catch((error: unknown) => {
      this.#qemu = null;
      throw error;
    });
    return this.#qemu;
  }

  get place(): RamPlace {
    return this.#place;
  }

  /** Durable when it resolves. */
  async setState(name: string, state: VmState, options: { epoch?: number } = {}): Promise<void> {
    const vm = this.#get(name);
    await vm.update((record) => ({ state: heldAgainst(record, state), ...options }));
    this.#changed(vm);
  }

  /**
   * Writes down what is so already: which files its disks are in, whose pages its memory has. Durable when it resolves.
   */
  async amend(name: string, change: (record: VmRecord) => RecordAmendment): Promise<void> {
    await this.#get(name).update(change);
    this.#changed(this.#get(name));
  }

  /** VM_BUSY if another job has it. Idempotent, durable. */
  async reserve(name: string, job: string): Promise<void> {
    const vm = this.#get(name);
    await vm.update((record) => reservedBy(record, job));
    this.#changed(vm);
  }

  /** Leaves another job's reservation alone; nothing to do if the VM is gone. */
  async unreserve(name: string, job: string): Promise<void> {
    const vm = this.#vms.get(name);
    if (vm === undefined) return;
    await vm.update((record) => (record.job === job ? { job: null } : null));
    this.#changed(vm);
  }

  /**
   * The VM and all its traces, also one that is starting. Idempotent; a VM that gets the name while this one goes is
   * left alone.
   */
  async destroy(name: string): Promise<void> {
    const vm = this.#vms.get(name);
    vm?.start.abort();
    await this.#locks.hold(name, async () => {
      if (vm !== undefined && this.#vms.get(name) === vm) await this.#remove(vm);
    });
  }

  pause(name: string): Promise<void> {
    return this.#let(name, 'stop', 'paused');
  }

  resume(name: string): Promise<void> {
    return this.#let(name, 'cont', 'running');
  }

  async #let(name: string, command: 'stop' | 'cont', state: 'paused' | 'running'): Promise<void> {
    await connectedQmp(this.#get(name)).catch(() => undefined);
    await this.#locks.hold(name, async () => {
      const vm = await this.#own(name, ['running', 'paused']);
      await vm.qmp.execute(command);
      vm.liveState = state;
      await vm.update({ state });
      this.#changed(vm);
    });
  }

  /**
   * Ends QEMU and frees the memory; the VM stays listed as stopped until it is stopped again or its name is used again.
   * What a departed VM has left goes at once, but only when no job has it any more, by force or not: its new home may
   * still need it.
   */
  async stop(name: string, options: StopOptions): Promise<void> {
    await this.#locks.hold(name, async () => {
      const states: VmState[] = ['running', 'paused', 'stopped'];
      if (this.#get(name).job === null) states.push('departed');
      const vm = await this.#own(name, states, options.isForced);
      if (isOver(vm)) return this.#remove(vm);
      vm.isEnding = true;
      await this.#keeper.end(vm, options);
      await this.#keeper.settle(vm, 'stopped');
    });
  }

  on(event: 'exit', listener: (name: string, info: VmExit) => void): void;
  on(event: 'change', listener: (name: string) => void): void;
  on(event: string, listener: (...args: never[]) => void): void {
    this.#emitter.on(event, listener as (...args: unknown[]) => void);
  }

  off(event: 'exit' | 'change', listener: (...args: never[]) => void): void {
    this.#emitter.off(event, listener as (...args: unknown[]) => void);
  }

  /** The daemon goes, QEMUs stay. Sessions on the VMs' memory are closed before. */
  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#keeper.close();
    for (const vm of this.#vms.values()) vm.start.abort();
    await Promise.all([...this.#vms.keys()].map((name) => this.#locks.hold(name, () => Promise.resolve())));
    for (const vm of this.#vms.values()) {
      vm.client?.close();
      vm.exitWatch?.close();
      await vm.settlingIn;
      vm.memory?.close();
      vm.memory = null;
      await vm.settled();
    }
  }

  #get(name: string): Vm {
    const vm = this.#vms.get(name);
    if (vm !== undefined) return vm;
    throw new MigrationError('NOT_FOUND', `no VM ${name} on ${this.#options.host}`);
  }

  /** For calls of users: the VM is in one of these states, belongs to this host, and no job has it. */
  async #own(name: string, states: readonly VmState[], isJobIgnored = false): Promise<Vm> {
    const vm = this.#get(name);
    if (vm.job !== null && !isJobIgnored) throw new MigrationError('VM_BUSY', `${name} is part of job ${vm.job}`);
    if (!states.includes(vm.state)) throw new MigrationError('CONFLICT', `${name} is ${vm.state}`);
    const owner = await this.#options.registry.owner(name);
    if (!isOver(vm) && (owner?.owner !== this.#options.host || owner.epoch !== vm.epoch)) {
      throw new MigrationError('OWNER_CHANGED', `${name} belongs to ${owner?.owner ?? 'nobody'}, not to this host`);
    }
    return vm;
  }

  /** The name is free, or only a stopped VM has it, which then goes. */
  async #clearName(name: string): Promise<void> {
    if (this.#isClosed) throw new MigrationError('CANCELLED', 'the daemon is closing');
    if (this.#unreadable.has(name)) {
      throw new MigrationError('CORRUPT', `${join(this.#directory, name)} holds a record that cannot be read`, {
        remedy: 'look at it, then remove the directory and restart the daemon',
      });
    }
    const vm = this.#vms.get(name);
    if (vm === undefined) return;
    if (vm.state !== 'stopped' || vm.job !== null) {
      throw new MigrationError('CONFLICT', `a VM ${name} is ${vm.state} on ${this.#options.host}`);
    }
    await this.#remove(vm);
  }

  async #create(spec: VmSpec, start: VmStart): Promise<Vm> {
    const vm = await createVm(this.#directory, spec, start, { place: this.#place, qemu: await this.qemu() });
    this.#vms.set(spec.name, vm);
    return vm;
  }

  async #launch(vm: Vm, options: BringUpOptions): Promise<void> {
    await bringUp(vm, options, this.#options, { place: this.#place, qemu: await this.qemu() });
    this.#keeper.attach(vm);
  }

  /** The VM once `start` is done; nothing is left of it when that fails. */
  async #orNothing(vm: Vm, start: () => Promise<void>): Promise<Vm> {
    try {
      await start();
    } catch (error) {
      await this.#undo(vm);
      throw error;
    }
    this.#changed(vm);
    return vm;
  }

  async #undo(vm: Vm): Promise<void> {
    try {
      await this.#remove(vm);
    } catch (error) {
      this.#options.log.error(
        { vm: vm.spec.name, error: toMigrationError(error).toJSON() },
        'a failed start leaves something',
      );
    }
  }

  async #find(name: string): Promise<void> {
    const directory = join(this.#directory, name);
    try {
      const record = await readRecord(directory);
      if (record === null) {
        await rm(directory, { recursive: true, force: true });
        return;
      }
      if (record.spec.name !== name) throw new MigrationError('CORRUPT', `${directory} holds the record of another VM`);
      const vm = new Vm(directory, record);
      this.#vms.set(name, vm);
      const { native, log } = this.#options;
      if ((await adopt(vm, { keeper: this.#keeper, native, log })) === 'unwanted') await this.#remove(vm);
    } catch (error) {
      if (!this.#vms.has(name)) this.#unreadable.add(name);
      this.#options.log.error({ vm: name, error: toMigrationError(error).toJSON() }, 'a VM cannot be taken up again');
    }
  }

  async #remove(vm: Vm): Promise<void> {
    await this.#keeper.remove(vm);
    this.#vms.delete(vm.spec.name);
    this.#changed(vm);
  }

  #changed(vm: Vm): void {
    this.#emitter.emit('change', vm.spec.name);
  }
}

function isOver({ state }: Vm): boolean {
  return state === 'stopped' || state === 'departed';
}

/**
 * The three ways to start a VM on this host: run by a user, waiting for the state of a VM on another host, waiting for
 * the state of an image. If a start rejects, it removes everything of the VM.
 */
import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { VmSpec } from '../../domain/vm.js';
import { Reserve } from '../../durable/reserve.js';
import { checkSpec } from '../../schemas/vm-spec.js';
import type { VmCgroups } from '../contain/cgroups.js';
import { UserPool } from '../contain/users.js';
import { type BringUpOptions, bringUp, createVm, type VmStart } from './create.js';
import type { VmKeeper } from './keeper.js';
import type { MemoryRoom } from './memory-room.js';
import type { CloneOptions, IncomingOptions, VmManagerOptions } from './options.js';
import { regionFiles } from './ram-files.js';
import type { RamPlace } from './ram-place.js';
import { identityDueOf } from './settle-in.js';
import type { VmTable } from './table.js';
import type { Vm } from './vm.js';

export interface StarterParts {
  readonly place: RamPlace;
  readonly table: VmTable;
  readonly keeper: VmKeeper;
  readonly room: MemoryRoom;
  readonly cgroups: Promise<VmCgroups>;
}

export class VmStarter {
  readonly #options: VmManagerOptions;
  readonly #place: RamPlace;
  readonly #table: VmTable;
  readonly #keeper: VmKeeper;
  readonly #room: MemoryRoom;
  readonly #cgroups: Promise<VmCgroups>;
  readonly #users: UserPool;
  #isClosed = false;

  constructor(options: VmManagerOptions, { place, table, keeper, room, cgroups }: StarterParts) {
    this.#options = options;
    this.#place = place;
    this.#table = table;
    this.#keeper = keeper;
    this.#room = room;
    this.#cgroups = cgroups;
    this.#users = new UserPool(options.qemuUsers ?? null, options.stateDir);
  }

  /** Refuses further starts. */
  close(): void {
    this.#isClosed = true;
  }

  /** Resolves when the VM runs, at an epoch above `epochMin`. */
  async run(input: VmSpec, epochMin: number): Promise<Vm> {
    const spec = checkSpec(input);
    return this.#table.locks.hold(spec.name, async () => {
      const { accel: auto, backend, host, registry } = this.#options;
      await this.#clearName(spec.name);
      const accel = await backend.resolveAccel(spec.accel === 'auto' ? auto : spec.accel);
      const before = await registry.owner(spec.name);
      const epoch = Math.max(await registry.lastEpoch(spec.name), epochMin) + 1;
      const vm = await this.#create(spec, { state: 'starting', epoch, accel, session: null });
      return this.#withCleanup(vm, async () => {
        const owner = { vm: spec.name, owner: host, epoch, session: null, incarnation: newIncarnation() };
        await registry.swapOwner(spec.name, before?.epoch ?? null, owner);
        await this.#launch(vm, { isIncoming: false });
        await vm.process.run();
        await vm.update({ state: 'running' });
      });
    });
  }

  /** See VmManager. */
  async prepareIncoming(input: VmSpec, options: IncomingOptions): Promise<Vm> {
    const spec = checkSpec(input);
    return this.#table.locks.hold(spec.name, async () => {
      const { backend, registry } = this.#options;
      const existing = this.#table.find(spec.name);
      if (existing?.state === 'incoming' && existing.session === options.session) return existing;
      await this.#clearName(spec.name);
      const owner = await registry.owner(spec.name);
      if (owner !== null && owner.epoch >= options.epoch) {
        throw new MigrationError(
          'OWNER_CHANGED',
          `${spec.name} has epoch ${owner.epoch} on this host; epoch ${options.epoch} is not newer`,
        );
      }
      const accel = await backend.resolveAccel(options.accel);
      const vm = await this.#create(spec, { state: 'incoming', epoch: options.epoch, accel, session: options.session });
      vm.cancelStartOn(options.signal);
      return this.#withCleanup(vm, () =>
        this.#launch(vm, { isIncoming: true, hasPreload: spec.hasPreload && options.isNative !== true }),
      );
    });
  }

  /** See VmManager. */
  async prepareClone(input: VmSpec, options: CloneOptions): Promise<Vm> {
    const spec = checkSpec(input);
    return this.#table.locks.hold(spec.name, async () => {
      if (!options.isReplacing && this.#table.find(spec.name)?.state === 'stopped') throw endedVmHas(spec.name);
      await this.#clearName(spec.name);
      const { registry, host } = this.#options;
      const before = await registry.owner(spec.name);
      const epoch = Math.max(await registry.lastEpoch(spec.name), options.epochMin) + 1;
      const { image, accel, isRegistered, statePath, diskSockets = {} } = options;
      const identityDue = identityDueOf(spec, options.nics);
      const vm = await this.#create(spec, { state: 'incoming', epoch, accel, session: null, image, ...identityDue });
      vm.cancelStartOn(options.signal);
      return this.#withCleanup(vm, async () => {
        const owner = { vm: spec.name, owner: host, epoch, session: null, incarnation: newIncarnation() };
        await registry.swapOwner(spec.name, before?.epoch ?? null, owner);
        await options.beforeLaunch();
        await this.#launch(vm, { isIncoming: true, isRegistered, statePath, diskSockets });
      });
    });
  }

  /**
   * Removes a stopped VM of this name. Throws CONFLICT if any other VM has the name, NO_SPACE if the state disk has no
   * room for a VM.
   */
  async #clearName(name: string): Promise<void> {
    if (this.#isClosed) throw new MigrationError('CANCELLED', 'the daemon is closing');
    await Reserve.for(join(this.#table.directory, name))?.checkRoom();
    this.#table.refuseUnreadable(name);
    const vm = this.#table.find(name);
    if (vm === undefined) return;
    if (vm.state !== 'stopped' || vm.job !== null) {
      throw new MigrationError('CONFLICT', `VM ${name} exists on ${this.#options.host} and is ${vm.state}`);
    }
    await this.#keeper.remove(vm);
  }

  async #create(spec: VmSpec, start: VmStart): Promise<Vm> {
    const context = { place: this.#place, backend: this.#options.backend };
    // A place that does not exist is a clearer reason than one that has no room.
    await regionFiles(this.#place, spec, start.image ?? null);
    const uids = () => new Set(this.#table.all().flatMap(({ record }) => record.qemuUid ?? []));
    return this.#room.admit(spec, () =>
      this.#users.with(uids, async (uid) => {
        const user = uid === null ? {} : { qemuUid: uid };
        const vm = await createVm(this.#table.directory, spec, { ...start, ...user }, context);
        this.#table.add(vm);
        return vm;
      }),
    );
  }

  async #launch(vm: Vm, options: Omit<BringUpOptions, 'cgroups'>): Promise<void> {
    await bringUp(vm, { ...options, cgroups: await this.#cgroups }, this.#options, this.#place);
    this.#keeper.attach(vm);
  }

  /** Runs `start` and returns the VM. If `start` fails, it removes everything of the VM. */
  async #withCleanup(vm: Vm, start: () => Promise<void>): Promise<Vm> {
    try {
      await start();
    } catch (error) {
      await this.#undo(vm);
      throw error;
    }
    this.#table.changed(vm);
    return vm;
  }

  async #undo(vm: Vm): Promise<void> {
    try {
      // What the process held is free after the first attempt, and the second one may need it: descriptors, above all.
      await this.#keeper.remove(vm).catch(() => this.#keeper.remove(vm));
    } catch (error) {
      this.#options.log.error(
        { vm: vm.spec.name, error: toMigrationError(error).toJSON() },
        "the start failed, and the VM's process, files or taps cannot be removed; " +
          `its directory is ${vm.directory}; try: vmctl stop ${vm.spec.name} --force`,
      );
    }
  }
}

function endedVmHas(name: string): MigrationError {
  return new MigrationError('CONFLICT', `an ended VM is named ${name}, and has its exit code and logs`, {
    remedy: `choose another --name, remove that VM with "vmctl stop ${name}", or fork with --replace`,
  });
}

function newIncarnation(): string {
  return randomBytes(16).toString('hex');
}

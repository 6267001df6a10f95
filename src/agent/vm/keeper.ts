/**
 * The life of a VM after its start. The keeper notices when QEMU ends, and ends QEMU on request. It does not poll while
 * the connection to QEMU is open; the end of the connection starts the polling.
 */
import { rm } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import type { RunState, VmBackend } from '../../backends/backend.js';
import { toMigrationError } from '../../domain/errors.js';
import type { VmExit } from '../../domain/vm.js';
import type { Registry } from '../../engine/ports/registry.js';
import type { Log } from '../../kit/log.js';
import { endProcess, isAlive, waitForExit } from '../../kit/process.js';
import { ExitWatch, readExitCode } from './exit-port.js';
import { removeTaps } from './network.js';
import { type RamPlace, removeRegionFiles } from './ram-files.js';
import { settleIn } from './settle-in.js';
import type { VmTable } from './table.js';
import type { Vm } from './vm.js';

export interface StopOptions {
  /** True: kill QEMU with SIGKILL, even if a job holds the VM. */
  readonly isForced: boolean;
  /** No session and no fork needs the VM. By force it is then ended in any state. */
  readonly isUnclaimed?: boolean;
  /** Press the guest's power button first, and wait this long for it to shut down. */
  readonly gracefulMs?: number;
}

export interface KeeperOptions {
  readonly host: string;
  readonly place: RamPlace;
  readonly registry: Registry;
  readonly log: Log;
  readonly backend: VmBackend;
  readonly table: VmTable;
}

const QUIT_TIMEOUT_MS = 5_000;
const TERM_GRACE_MS = 3_000;
const RECONNECT_MS = 250;
/** After the end of the connection QEMU may take this long to exit before it counts as alive. */
const END_AFTER_CONNECTION_MS = 2_000;
const UNKNOWN_EXIT = { code: null, signal: null };

export class VmKeeper {
  readonly #options: KeeperOptions;
  #isClosed = false;

  constructor(options: KeeperOptions) {
    this.#options = options;
  }

  /** Called when the daemon exits. The keeper ignores the end of a QEMU from then on. */
  close(): void {
    this.#isClosed = true;
  }

  /** Follows the events of a VM that has just been connected. */
  attach(vm: Vm): void {
    vm.process.follow({
      onRunState: (state) => this.#onRunState(vm, state),
      onShutdown: (reason, isPowerOff) => {
        vm.shutdown = { reason, isPowerOff };
      },
      onLost: () => this.#startWatch(vm),
    });
    vm.exitWatch ??= new ExitWatch(vm.place.exitPath, (code) => {
      vm.exitCode = code;
      this.#options.table.changed(vm);
    });
    if (vm.liveState === 'running') this.#settleIn(vm);
  }

  /** Connects to a VM of an earlier daemon. If QEMU does not answer, the keeper retries for as long as it lives. */
  async reconnect(vm: Vm): Promise<void> {
    if (!(await this.#connect(vm))) this.#startWatch(vm);
  }

  /** Ends QEMU in the gentlest way that works. The caller has set `isEnding`. */
  async end(vm: Vm, options: StopOptions): Promise<void> {
    const { process } = vm.record;
    if (process === null) return;
    if (!options.isForced) {
      if (
        options.gracefulMs !== undefined &&
        (await pressPowerButton(vm)) &&
        (await waitForExit(process, options.gracefulMs))
      ) {
        return;
      }
      await vm.process.quit().catch(() => undefined);
      if (await waitForExit(process, QUIT_TIMEOUT_MS)) return;
    }
    await endProcess(process, 0);
  }

  /**
   * Called when QEMU has ended. It records and reports the exit and frees the VM's resources. The memory of a departed
   * VM
   * is kept, because its new owner still needs it.
   */
  async settle(vm: Vm, fallbackReason: string): Promise<void> {
    const { name } = vm.spec;
    const child = vm.exited === null ? UNKNOWN_EXIT : await Promise.race([vm.exited, sleep(1000, UNKNOWN_EXIT)]);
    const isDeparted = vm.state === 'departed';
    const reason = vm.shutdown?.reason ?? fallbackReason;
    const written = (await readExitCode(vm.place.exitPath)) ?? vm.record.exitCodeBefore;
    const exitCode = written ?? (vm.shutdown?.isPowerOff === true ? 0 : null);
    const exit: VmExit = { at: new Date().toISOString(), reason, ...child, exitCode };
    release(vm);
    await vm.update({ process: null, exit, memory: null, ...(isDeparted ? {} : { state: 'stopped' as const }) });
    this.#options.log.info({ vm: name, exit }, 'QEMU has ended');
    this.#options.table.ended(vm, exit);
    this.#options.table.changed(vm);
    if (isDeparted) return;
    try {
      vm.memory?.close();
      vm.memory = null;
    } catch (error) {
      // A listener of `exit` is still closing its session. `remove` closes the handle later.
      this.#warn(vm, error, 'QEMU has ended, but a session is still open on the memory of the VM');
    }
    await removeRegionFiles(this.#options.place, vm.spec);
    await removeTaps(vm.record.taps);
  }

  /** Removes the VM and everything that belongs to it. The caller holds the VM's lock. */
  async remove(vm: Vm): Promise<void> {
    const { name } = vm.spec;
    const { host, place, registry } = this.#options;
    vm.isEnding = true;
    // An incoming VM has never run, so it needs no gentle end.
    if (vm.record.process !== null) await endProcess(vm.record.process, vm.state === 'incoming' ? 0 : TERM_GRACE_MS);
    // The record may not have been written, for example to a full file system.
    else if (vm.state === 'incoming' || vm.state === 'starting') await this.endUnrecorded(vm);
    release(vm);
    vm.memory?.close();
    vm.memory = null;
    await removeRegionFiles(place, vm.spec);
    await removeTaps(vm.record.taps);
    const owner = await registry.owner(name);
    if (owner?.owner === host && owner.epoch === vm.epoch) await registry.removeOwner(name, vm.epoch);
    await vm.settled();
    await rm(vm.directory, { recursive: true, force: true });
    this.#options.table.forget(vm);
  }

  /** Ends the QEMU of a record without a pid. A crash may have come between starting QEMU and recording its pid. */
  async endUnrecorded(vm: Vm): Promise<void> {
    for (const process of await this.#options.backend.findStray(vm.place)) await endProcess(process, 0);
  }

  #onRunState(vm: Vm, state: RunState): void {
    vm.liveState = state;
    this.#options.table.changed(vm);
    if (vm.liveState === 'running') this.#settleIn(vm);
  }

  /** Gives a clone its identity when it runs for the first time, or when an earlier attempt has failed. */
  #settleIn(vm: Vm): void {
    if (this.#isClosed || vm.record.identityDue === null) return;
    vm.settlingIn ??= settleIn(vm)
      .catch((error: unknown) => {
        if (!this.#isClosed && !vm.isEnding)
          this.#warn(vm, error, 'the clone could not be given all of its own identity');
      })
      .finally(() => {
        vm.settlingIn = null;
        this.#options.table.changed(vm);
      });
  }

  #startWatch(vm: Vm): void {
    if (this.#isClosed || vm.isEnding) return;
    this.#watch(vm).catch((error: unknown) => this.#warn(vm, error, 'the VM is no longer watched'));
  }

  /** Called after the end of the connection. Polls until QEMU has ended or answers again. */
  async #watch(vm: Vm): Promise<void> {
    const { process } = vm.record;
    if (process !== null && !(await waitForExit(process, END_AFTER_CONNECTION_MS).catch(() => false))) {
      // A process that cannot be looked at, for want of descriptors, counts as alive.
      while (await isAlive(process).catch(() => true)) {
        if (this.#isClosed || vm.isEnding || (await this.#connect(vm))) return;
        await sleep(RECONNECT_MS);
      }
    }
    await this.#options.table.locks.hold(vm.spec.name, async () => {
      if (!this.#isClosed && !vm.isEnding) await this.settle(vm, 'killed');
    });
  }

  async #connect(vm: Vm): Promise<boolean> {
    try {
      vm.liveState = await vm.process.connect();
    } catch (error) {
      this.#warn(vm, error, 'QEMU is alive but does not answer');
      return false;
    }
    this.attach(vm);
    this.#options.table.changed(vm);
    return true;
  }

  #warn(vm: Vm, error: unknown, message: string): void {
    this.#options.log.warn({ vm: vm.spec.name, error: toMigrationError(error).toJSON() }, message);
  }
}

/** Asks the guest to shut down. Returns false if QEMU cannot be reached. */
function pressPowerButton(vm: Vm): Promise<boolean> {
  return vm.process.powerdown().then(
    () => true,
    (error: unknown) => toMigrationError(error).code !== 'QEMU_GONE',
  );
}

function release(vm: Vm): void {
  vm.process.close();
  vm.exitWatch?.close();
  vm.exitWatch = null;
}

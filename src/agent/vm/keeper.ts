/**
 * The life of a VM after its start. The keeper notices when QEMU ends, and ends QEMU on request. It does not poll while
 * the connection to QEMU is open; the end of the connection starts the polling.
 */
import { readdir, rm, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { ConnectedState, RunState } from '../../backends/backend.js';
import { toMigrationError } from '../../domain/errors.js';
import type { VmExit } from '../../domain/vm.js';
import type { Registry } from '../../engine/ports/registry.js';
import type { Log } from '../../kit/log.js';
import { endProcess, isAlive, waitForExit } from '../../kit/process.js';
import type { VmCgroups } from '../contain/cgroups.js';
import { endProcessesOf } from '../contain/processes.js';
import { readExitCode, watchExitPort } from './exit-port.js';
import { removeTaps } from './network.js';
import { removeRegionFiles } from './ram-files.js';
import type { RamPlace } from './ram-place.js';
import { settleIn } from './settle-in.js';
import type { VmTable } from './table.js';
import type { ManagedVm, Vm } from './vm.js';

export interface StopOptions {
  /** True: kill QEMU with SIGKILL, even if a job holds the VM. */
  readonly isForced: boolean;
  /** Our word for the end in the VM's view. Default: `stopped`. */
  readonly reason?: string;
  /** No session and no fork needs the VM. By force it is then ended in any state. */
  readonly isUnclaimed?: boolean;
  /** The VM that is meant. If another one has the name by now, nothing happens. */
  readonly only?: ManagedVm;
}

export interface KeeperOptions {
  readonly host: string;
  readonly place: RamPlace;
  readonly registry: Registry;
  readonly log: Log;
  readonly table: VmTable;
  readonly cgroups: Promise<VmCgroups>;
}

const QUIT_TIMEOUT_MS = 5_000;
const TERM_GRACE_MS = 3_000;
/** The waits between two attempts to reach a QEMU that does not answer. Its memory may be away for hours. */
const RECONNECT_MS_FIRST = 250;
const RECONNECT_MS_MAX = 5_000;
/** After the end of the connection QEMU may take this long to exit before it counts as alive. */
const END_AFTER_CONNECTION_MS = 2_000;
/** The exit's reason of a parent that ended with its fork. */
export const FORKED = 'forked';
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
    void this.#options.cgroups.then((cgroups) => cgroups.close());
  }

  /** Follows the events of a VM that has just been connected. */
  attach(vm: Vm): void {
    vm.process.follow({
      onRunState: (state) => this.#onRunState(vm, state),
      onShutdown: (reason, isPowerOff) => this.#onShutdown(vm, reason, isPowerOff),
      onExitPort: () => vm.exitWatch?.look(),
      onLost: () => this.#startWatch(vm),
    });
    vm.exitWatch ??= watchExitPort(vm.process, vm.place.exitPath, (code) => this.#onExitCode(vm, code));
    // There may be output of a time in which no daemon was connected.
    vm.exitWatch.look();
    this.#onRunning(vm);
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
      await vm.process.quit().catch(() => undefined);
      if (await waitForExit(process, QUIT_TIMEOUT_MS)) return;
    }
    await endProcess(process, 0);
  }

  /**
   * Called when QEMU has ended. It records and reports the exit and frees the VM's resources. The memory of a departed
   * VM is kept, because its new owner still needs it.
   */
  async settle(vm: Vm, fallbackReason: string): Promise<void> {
    const { name } = vm.spec;
    // A parent whose memory became an image is killed on purpose. That must not look like a crash.
    const exited = fallbackReason === FORKED ? null : vm.exited;
    const child = exited === null ? UNKNOWN_EXIT : await Promise.race([exited, sleep(1000, UNKNOWN_EXIT)]);
    const isDeparted = vm.state === 'departed';
    const { guestEnd } = vm;
    // If the daemon has ended QEMU, QEMU's own word says only that.
    const reason = guestEnd?.reason ?? (vm.isEnding ? null : vm.shutdown?.reason) ?? fallbackReason;
    const written = vm.exitCode ?? (await readExitCode(vm.place.exitPath)) ?? vm.record.exitCodeBefore;
    const exitCode = written ?? guestEnd?.exitCode ?? null;
    const exit: VmExit = { at: new Date().toISOString(), reason, ...child, exitCode };
    release(vm);
    await endLeft(vm);
    await vm.process.outputKept();
    await vm.updateOrOwe({ process: null, exit, memory: null, ...(isDeparted ? {} : { state: 'stopped' as const }) });
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
    await (await this.#options.cgroups).remove(name);
  }

  /** Removes the VM and everything that belongs to it. The caller holds the VM's lock. */
  async remove(vm: Vm): Promise<void> {
    const { name } = vm.spec;
    const { host, place, registry } = this.#options;
    vm.isEnding = true;
    const { process } = vm.record;
    const isStart = vm.state === 'incoming' || vm.state === 'starting';
    // An incoming VM has never run, so it needs no gentle end.
    if (process !== null) await endProcess(process, vm.state === 'incoming' ? 0 : TERM_GRACE_MS);
    // The record may not have been written, for example to a full file system.
    else if (isStart) await this.endUnrecorded(vm);
    release(vm);
    await endLeft(vm);
    // Whoever gets the name next has logs at the same place.
    if (process !== null || isStart) await vm.process.outputKept();
    vm.memory?.close();
    vm.memory = null;
    await removeRegionFiles(place, vm.spec);
    await removeTaps(vm.record.taps);
    await (await this.#options.cgroups).remove(name);
    const owner = await registry.owner(name);
    if (owner?.owner === host && owner.epoch === vm.epoch) await registry.removeOwner(name, vm.epoch);
    await vm.settled();
    await emptyOfSockets(vm);
    await rm(vm.directory, { recursive: true, force: true });
    this.#options.table.forget(vm);
  }

  /** Ends the QEMU of a record without a pid. A crash may have come between starting QEMU and recording its pid. */
  async endUnrecorded(vm: Vm): Promise<void> {
    for (const process of await vm.findStray()) await endProcess(process, 0);
  }

  #onExitCode(vm: Vm, code: number): void {
    vm.exitCode = code;
    this.#options.table.changed(vm);
    // The process has given the code away, so it is recorded.
    vm.update({ exitCodeBefore: code }).catch((error: unknown) => {
      if (!vm.isForgotten) this.#warn(vm, error, "the guest's exit code cannot be recorded");
    });
  }

  /**
   * The first reason counts: that of the guest, not that of the `quit` that follows it. A guest that has ended leaves
   * its process paused, so that its last words can be read.
   */
  #onShutdown(vm: Vm, reason: string, isPowerOff: boolean): void {
    if (vm.shutdown !== null) return;
    vm.shutdown = { reason, isPowerOff };
    if (this.#isClosed || vm.guestEnd === null) return;
    const ending = async () => {
      await vm.exitWatch?.drain();
      await vm.process.quit();
    };
    ending().catch((error: unknown) => {
      // A process of an earlier build ends without being told.
      const { code } = toMigrationError(error);
      if (code !== 'QEMU_GONE') this.#warn(vm, error, 'the guest has ended, but its QEMU does not end');
    });
  }

  #onRunState(vm: Vm, state: RunState): void {
    vm.liveState = state;
    this.#options.table.changed(vm);
    this.#onRunning(vm);
  }

  /** Also of a VM that could not be paused when its damage was found, because its QEMU did not answer. */
  #onRunning(vm: Vm): void {
    if (vm.liveState !== 'running') return;
    if (vm.record.damage === undefined) return this.#settleIn(vm);
    vm.process.pause().catch((error: unknown) => this.#warn(vm, error, 'a VM whose memory is damaged runs on'));
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
      let waitMs = RECONNECT_MS_FIRST;
      while (await isAlive(process).catch(() => true)) {
        const isToldAlready = waitMs > RECONNECT_MS_FIRST;
        if (this.#isClosed || vm.isEnding || (await this.#connect(vm, isToldAlready))) return;
        if (await waitForExit(process, waitMs).catch(() => false)) break;
        waitMs = Math.min(waitMs * 2, RECONNECT_MS_MAX);
      }
    }
    await this.#options.table.locks.hold(vm.spec.name, async () => {
      if (!this.#isClosed && !vm.isEnding) await this.settle(vm, 'killed');
    });
  }

  async #connect(vm: Vm, isToldAlready = false): Promise<boolean> {
    let state: ConnectedState;
    try {
      state = await vm.process.connect();
    } catch (error) {
      if (!isToldAlready) this.#warn(vm, error, 'QEMU is alive but does not answer; it is asked now and then');
      return false;
    }
    vm.liveState = state === 'running' ? 'running' : 'paused';
    this.attach(vm);
    this.#options.table.changed(vm);
    // The guest has ended while no daemon was connected.
    if (state === 'shutdown') this.#onShutdown(vm, 'guest-shutdown', true);
    if (state === 'panicked') this.#onShutdown(vm, state, false);
    return true;
  }

  #warn(vm: Vm, error: unknown, message: string): void {
    this.#options.log.warn({ vm: vm.spec.name, error: toMigrationError(error).toJSON() }, message);
  }
}

/** Ends what a guest that had broken out has left behind. */
async function endLeft({ record: { process, qemuUid, mountNamespace } }: Vm): Promise<void> {
  // Once the end is recorded, the kernel may have given the namespace's name to another.
  if (process !== null && qemuUid !== undefined && mountNamespace !== undefined)
    await endProcessesOf(qemuUid, mountNamespace);
}

/** Whatever a process has put into its directory: nothing below it is looked at. */
async function emptyOfSockets({ place }: Vm): Promise<void> {
  if (place.socketDirectory === place.directory) return;
  for (const name of await readdir(place.socketDirectory).catch(() => []))
    await unlink(join(place.socketDirectory, name)).catch(() => undefined);
}

function release(vm: Vm): void {
  vm.process.close();
  vm.exitWatch?.close();
  vm.exitWatch = null;
}

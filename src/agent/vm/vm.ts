/** One VM of this host: its durable record, and the daemon's objects while it lives. Only VmManager changes it. */

import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { VmBackend, VmPlace, VmProcess } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { type GuestEnd, guestEndText, isGuestEnd } from '../../domain/guest-end.js';
import type { Accel, VmExit, VmSpec, VmState, VmView } from '../../domain/vm.js';
import type { ChildExit, ProcessIdentity } from '../../kit/process.js';
import type { RegionFile, VmMemoryHandle } from '../../native/types.js';
import { type ExitWatch, exitPath } from './exit-port.js';
import { isMerging, type MergedOverlay, mergesDisks, refuseIfDamaged, type VmRecord, writeRecord } from './record.js';

const OWED_RETRY_MS = 2_000;
/** How long a VM that is damaged may take to stop. */
const PAUSE_MS_MAX = 5_000;

/** A VM as other parts of the agent see it. It stays the same object until the VM is destroyed. */
export interface ManagedVm {
  readonly spec: VmSpec;
  readonly state: VmState;
  readonly epoch: number;
  readonly accel: Accel;
  /** Throws QEMU_GONE if QEMU has ended. */
  readonly pid: number;
  /** The QEMU process. If it has ended or is not connected, its calls fail. */
  readonly process: VmProcess;
  readonly directory: string;
  /** Empty for private memory. */
  readonly regions: readonly RegionFile[];
  /** Null without preload. */
  readonly memory: VmMemoryHandle | null;
  readonly job: string | null;
  /** Overlays of its disks are being merged, or a merge has not been ended yet. */
  readonly isMerging: boolean;
  /** The overlay that is being merged. The same object until that merge has ended. */
  readonly mergedOverlay: MergedOverlay | null;
  /** The session that made this VM a target. It stays set when the VM runs. Null for a VM started on this host. */
  readonly session: string | null;
  /** The image that a clone runs on. Null for any other VM. */
  readonly image: string | null;
  readonly qemuVersion: string;
  readonly machine: string;
  /** Its vCPUs have run here, as far as this daemon knows. */
  readonly hasRun: boolean;
  /** How the guest has ended by itself, or null if it has not. Known as soon as its QEMU has reported it. */
  readonly guestEnd: GuestEnd | null;
  /** Null while QEMU runs. */
  readonly exit: VmExit | null;
}

export class Vm implements ManagedVm {
  readonly directory: string;
  readonly place: VmPlace;
  readonly process: VmProcess;
  readonly #backend: VmBackend;
  #record: VmRecord;
  #lastWrite: Promise<unknown> = Promise.resolve();
  #liveState: 'running' | 'paused' | null = null;
  #isKnownToRun = false;
  memory: VmMemoryHandle | null = null;
  /** The exit of QEMU. Only the daemon that started the process knows it. */
  exited: Promise<ChildExit> | null = null;
  /** The reason of the shutdown, as QEMU has reported it. */
  shutdown: { readonly reason: string; readonly isPowerOff: boolean } | null = null;
  /** The code from the exit port of a running VM. After the end of the VM it is in the record. */
  exitCode: number | null = null;
  exitWatch: ExitWatch | null = null;
  /** The current attempt to give a clone its identity. */
  settlingIn: Promise<void> | null = null;
  /** True if the VM has been removed, so that nothing of it may be written any more. */
  isForgotten = false;
  /** Nobody may let the VM run: a disk may have switched to a base beside its overlay. See `restoreRunState`. */
  isHeld: boolean;
  /** True while the daemon itself ends the VM, whose exit then needs no reaction. */
  isEnding = false;
  /** Aborting it cancels a start in progress. */
  readonly start = new AbortController();

  constructor(directory: string, record: VmRecord, backend: VmBackend) {
    this.directory = directory;
    this.#record = record;
    // An earlier daemon has been merging.
    this.isHeld = this.mergedOverlay !== null;
    this.#backend = backend;
    this.place = placeIn(directory, record.spec.name, record.qemuUid !== undefined);
    this.process = backend.processAt(this.place);
  }

  /** Cancels the start when `signal` aborts, or at once if it has aborted. */
  cancelStartOn(signal: AbortSignal | undefined): void {
    signal?.addEventListener('abort', () => this.start.abort(), { once: true });
    if (signal?.aborted === true) this.start.abort();
  }

  /** The state by QEMU's events. It is not recorded, because a restarted daemon asks QEMU. */
  get liveState(): 'running' | 'paused' | null {
    return this.#liveState;
  }

  set liveState(state: 'running' | 'paused') {
    this.#liveState = state;
    this.#isKnownToRun ||= state === 'running';
  }

  get hasRun(): boolean {
    const { state } = this.#record;
    return this.#isKnownToRun || this.guestEnd !== null || state === 'running' || state === 'paused';
  }

  get record(): VmRecord {
    return this.#record;
  }

  get spec(): VmSpec {
    return this.#record.spec;
  }

  get state(): VmState {
    const { state } = this.#record;
    return (state === 'running' || state === 'paused') && this.liveState !== null ? this.liveState : state;
  }

  get epoch(): number {
    return this.#record.epoch;
  }

  get accel(): Accel {
    return this.#record.accel;
  }

  get regions(): readonly RegionFile[] {
    return this.#record.regions;
  }

  /** It runs no more on this host. */
  get isOver(): boolean {
    return this.state === 'stopped' || this.state === 'departed';
  }

  /** For the end of the daemon: leaves the process to the next one. */
  async close(): Promise<void> {
    this.process.close();
    this.exitWatch?.close();
    await this.settlingIn;
    this.memory?.close();
    this.memory = null;
    await this.settled();
  }

  /** Throws VM_BUSY while the VM is held, and DAMAGED if its memory is. */
  refuseToRun(): void {
    refuseIfDamaged(this.#record);
    if (this.isHeld) throw mergesDisks(this.spec.name);
  }

  /** See VmManager. */
  async restoreRunState(work: () => Promise<boolean>): Promise<void> {
    if (!(await work())) return;
    this.isHeld = false;
    if (this.#record.state === 'running') await this.process.run();
  }

  get isMerging(): boolean {
    return isMerging(this.#record);
  }

  get mergedOverlay(): MergedOverlay | null {
    return this.#record.mergedOverlay ?? null;
  }

  get job(): string | null {
    return this.#record.job;
  }

  get session(): string | null {
    return this.#record.session;
  }

  get image(): string | null {
    return this.#record.image;
  }

  get qemuVersion(): string {
    return this.#record.qemuVersion;
  }

  get machine(): string {
    return this.#record.spec.machine;
  }

  get exit(): VmExit | null {
    return this.#record.exit;
  }

  get pid(): number {
    if (this.#record.process === null) throw this.gone();
    return this.#record.process.pid;
  }

  /** Finds processes of this VM by their command line. */
  findStray(): Promise<readonly ProcessIdentity[]> {
    return this.#backend.findStray(this.place);
  }

  gone(): MigrationError {
    const { name } = this.spec;
    const end = this.guestEnd;
    const text = end === null ? `the QEMU of ${name} has ended or does not answer` : guestEndText(name, end);
    return new MigrationError('QEMU_GONE', text);
  }

  get guestEnd(): GuestEnd | null {
    const reason = this.#record.exit?.reason ?? this.shutdown?.reason;
    const hasPoweredOff = this.shutdown?.isPowerOff === true;
    if (reason === undefined || !(hasPoweredOff || isGuestEnd(reason))) return null;
    const powerOff = hasPoweredOff ? 0 : null;
    const exitCode = this.#record.exit?.exitCode ?? this.exitCode ?? this.#record.exitCodeBefore ?? powerOff;
    return { reason, exitCode };
  }

  /**
   * Changes the record. Changes are made one after the other, and each is durable and visible when its promise
   * resolves. `change` may throw to refuse, or return null if the record needs no change.
   */
  async update(change: Partial<VmRecord> | ((record: VmRecord) => Partial<VmRecord> | null)): Promise<void> {
    const write = this.#lastWrite.then(async () => {
      const changed = typeof change === 'function' ? change(this.#record) : change;
      if (changed === null) return;
      const next = { ...this.#record, ...changed };
      await writeRecord(this.directory, next);
      this.#record = next;
    });
    this.#lastWrite = write.catch(() => undefined);
    await write;
  }

  /**
   * Changes the record as `update` does. If the disk is full, the change holds in memory, and is written as soon as
   * there is room. It is for what has happened already and cannot be refused: the end of a VM.
   */
  async updateOrOwe(change: Partial<VmRecord>): Promise<void> {
    try {
      await this.update(change);
    } catch (error) {
      if (!isFull(error)) throw error;
      this.#record = { ...this.#record, ...change };
      this.#owe();
    }
  }

  /** Writes the record again until there is room for it. A daemon that ends before finds the VM's process gone. */
  #owe(): void {
    setTimeout(() => {
      if (this.isForgotten) return;
      this.update({}).catch((error: unknown) => {
        if (isFull(error)) this.#owe();
      });
    }, OWED_RETRY_MS).unref();
  }

  /** Resolves when no write is in progress. */
  async settled(): Promise<void> {
    await this.#lastWrite;
  }
}

/** The files of a VM in its directory. A contained process has its sockets in a directory of its user below it. */
export function placeIn(directory: string, name: string, isContained: boolean): VmPlace {
  const socketDirectory = isContained ? join(directory, 'qemu') : directory;
  return {
    name,
    directory,
    socketDirectory,
    serialPath: join(socketDirectory, 'serial.sock'),
    serialLogPath: join(directory, 'serial.log'),
    exitPath: exitPath(directory),
    agentPath: join(socketDirectory, 'agent.sock'),
    outputPath: join(directory, 'qemu.log'),
  };
}

export function viewOf(vm: Vm, host: string): VmView {
  return {
    name: vm.spec.name,
    uuid: vm.spec.uuid,
    host,
    state: vm.state,
    epoch: vm.epoch,
    memoryBytes: vm.spec.memory.sizeBytes,
    pid: vm.record.process?.pid ?? null,
    machine: vm.machine,
    accel: vm.accel,
    job: vm.job,
    serialLog: vm.spec.hasSerial ? vm.place.serialLogPath : null,
    image: vm.image,
    exitCode: vm.record.exit?.exitCode ?? vm.exitCode ?? vm.record.exitCodeBefore,
    exit: vm.record.exit,
    identityIssue: identityIssue(vm),
    ...(vm.record.damage === undefined ? {} : { damage: vm.record.damage }),
  };
}

function isFull(error: unknown): boolean {
  return toMigrationError(error).code === 'NO_SPACE';
}

function identityIssue({ record }: Vm): string | null {
  if (record.identityDue === null) return null;
  return record.identityDue.failure ?? 'is still being given its own network and clock';
}

/** Pauses a running VM for `work`. If that rejects, the VM stays paused, and is held. */
export async function whilePaused<T>(vm: Vm, work: () => Promise<T>): Promise<T> {
  const { process, state } = vm;
  if (state === 'running') await process.pause();
  vm.isHeld = true;
  const result = await work();
  vm.isHeld = false;
  if (state === 'running') await process.run();
  return result;
}

/** Pauses a VM whose memory is damaged, and records why. Each is done although the other fails. */
export async function stopForGood(vm: Vm, damage: string): Promise<void> {
  const recording = vm.updateOrOwe({ state: 'paused', damage });
  // A vCPU that waits for a page runs no more, and cannot stop before the page comes. A QEMU that is not connected is
  // paused when it is (VmKeeper).
  const connected = vm.process.connected().then(() => vm.process.pause());
  const pausing = Promise.race([connected, sleep(PAUSE_MS_MAX, undefined, { ref: false })]);
  for (const outcome of await Promise.allSettled([recording, pausing]))
    if (outcome.status === 'rejected') throw outcome.reason;
}

/** One VM of this host: its durable record and what the daemon holds while it lives. Only VmManager changes it. */
import { join } from 'node:path';
import type { VmBackend, VmPlace, VmProcess } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { VmSpec, VmState, VmView } from '../../domain/vm.js';
import type { ChildExit } from '../../kit/process.js';
import type { RegionFile, VmMemoryHandle } from '../../native/types.js';
import { type ExitWatch, exitPath } from './exit-port.js';
import { type VmRecord, writeRecord } from './record.js';

/** What other parts of the agent see of a VM. It stays the same object until the VM is destroyed. */
export interface ManagedVm {
  readonly spec: VmSpec;
  readonly state: VmState;
  readonly epoch: number;
  readonly accel: 'kvm' | 'tcg';
  /** Throws QEMU_GONE if QEMU has ended. */
  readonly pid: number;
  /** What may be done with it is up to its connection; of one that has ended, nothing. */
  readonly process: VmProcess;
  readonly directory: string;
  /** Empty for private memory. */
  readonly regions: readonly RegionFile[];
  /** null without preload. */
  readonly memory: VmMemoryHandle | null;
  readonly job: string | null;
  /** The session that made this VM a target; it stays when the VM runs, null for one started here. */
  readonly session: string | null;
  /** The image that a clone runs on; null for any other VM. */
  readonly image: string | null;
  readonly qemuVersion: string;
  readonly machine: string;
}

export class Vm implements ManagedVm {
  readonly directory: string;
  readonly place: VmPlace;
  readonly process: VmProcess;
  #record: VmRecord;
  #lastWrite: Promise<unknown> = Promise.resolve();
  /** As the VM's own events say; not written down, because a restarted daemon asks QEMU. */
  liveState: 'running' | 'paused' | null = null;
  memory: VmMemoryHandle | null = null;
  /** Known only to the daemon that started it. */
  exited: Promise<ChildExit> | null = null;
  /** What it has said of its end. */
  shutdown: { readonly reason: string; readonly isPowerOff: boolean } | null = null;
  /** As the exit port says; of a VM that has ended the record knows it. */
  exitCode: number | null = null;
  exitWatch: ExitWatch | null = null;
  /** The attempt under way to give a clone its identity. */
  settlingIn: Promise<void> | null = null;
  /** The daemon itself is ending it: its end is no event. */
  isEnding = false;
  /** Aborted to give up a start that is under way. */
  readonly start = new AbortController();

  constructor(directory: string, record: VmRecord, backend: VmBackend) {
    this.directory = directory;
    this.#record = record;
    this.place = {
      name: record.spec.name,
      directory,
      serialPath: join(directory, 'serial.sock'),
      serialLogPath: join(directory, 'serial.log'),
      exitPath: exitPath(directory),
      agentPath: join(directory, 'agent.sock'),
      outputPath: join(directory, 'qemu.log'),
    };
    this.process = backend.processAt(this.place);
  }

  /** The start is given up when `signal` aborts, or has. */
  giveUpOn(signal: AbortSignal | undefined): void {
    signal?.addEventListener('abort', () => this.start.abort(), { once: true });
    if (signal?.aborted === true) this.start.abort();
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

  get accel(): 'kvm' | 'tcg' {
    return this.#record.accel;
  }

  get regions(): readonly RegionFile[] {
    return this.#record.regions;
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

  get pid(): number {
    if (this.#record.process === null) throw this.gone();
    return this.#record.process.pid;
  }

  gone(): MigrationError {
    return new MigrationError('QEMU_GONE', `the QEMU of ${this.spec.name} has ended or does not answer`);
  }

  /**
   * Changes are made one after the other; each is durable, and visible, when its promise resolves. `change` may throw
   * to refuse, or answer null: the record is as it shall be, and nothing is written.
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

  /** After this no write is under way. */
  async settled(): Promise<void> {
    await this.#lastWrite;
  }
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
  };
}

function identityIssue({ record }: Vm): string | null {
  if (record.identityDue === null) return null;
  return record.identityDue.failure ?? 'is still being given its own network and clock';
}

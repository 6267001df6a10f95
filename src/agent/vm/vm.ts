/** One VM of this host: its durable record and what the daemon holds while it lives. Only VmManager changes it. */
import { join } from 'node:path';
import type { QmpClient } from '../../backends/qemu/qmp.js';
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
  /** Throws QEMU_GONE while there is no connection. */
  readonly qmp: QmpClient;
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

export interface VmPaths {
  readonly qmp: string;
  readonly monitor: string;
  readonly serial: string;
  readonly serialLog: string;
  readonly preload: string;
  readonly output: string;
  /** What the guest has written to its exit port. */
  readonly exit: string;
  /** The guest agent's socket; there if the spec has one. */
  readonly agent: string;
}

export class Vm implements ManagedVm {
  readonly directory: string;
  readonly paths: VmPaths;
  #record: VmRecord;
  #lastWrite: Promise<unknown> = Promise.resolve();
  /** As QEMU's STOP and RESUME say; not written down, because a restarted daemon asks QEMU. */
  liveState: 'running' | 'paused' | null = null;
  client: QmpClient | null = null;
  memory: VmMemoryHandle | null = null;
  /** Known only to the daemon that started it. */
  exited: Promise<ChildExit> | null = null;
  shutdownReason: string | null = null;
  /** As the exit port says; of a VM that has ended the record knows it. */
  exitCode: number | null = null;
  exitWatch: ExitWatch | null = null;
  /** The attempt under way to give a clone its identity. */
  settlingIn: Promise<void> | null = null;
  /** The daemon itself is ending it: its end is no event. */
  isEnding = false;
  /** Aborted to give up a start that is under way. */
  readonly start = new AbortController();

  constructor(directory: string, record: VmRecord) {
    this.directory = directory;
    this.#record = record;
    this.paths = {
      qmp: join(directory, 'qmp.sock'),
      monitor: join(directory, 'monitor.sock'),
      serial: join(directory, 'serial.sock'),
      serialLog: join(directory, 'serial.log'),
      preload: join(directory, 'preload.sock'),
      output: join(directory, 'qemu.log'),
      exit: exitPath(directory),
      agent: join(directory, 'agent.sock'),
    };
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

  get qmp(): QmpClient {
    if (this.client === null || this.client.isClosed) throw this.gone();
    return this.client;
  }

  gone(cause?: unknown): MigrationError {
    return new MigrationError('QEMU_GONE', `the QEMU of ${this.spec.name} has ended or does not answer`, { cause });
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
    serialLog: vm.spec.hasSerial ? vm.paths.serialLog : null,
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

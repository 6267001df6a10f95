/**
 * An outgoing VM. The session exposes its memory to the target, stops its vCPUs and transfers its device state
 * (StateExport). Only a complete transfer may be committed, because QEMU does not resume the VM by itself once the
 * stream is complete.
 */
import { mkdir } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { StateExport, StateStream } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { ChunkRange, DirtyRound, FrozenDigests, SourceEndpointInfo } from '../../engine/ports/session.js';
import type { StopReply } from '../../engine/ports/source.js';
import { failureToError } from '../../native/failure.js';
import type { DataListenerHandle, SourceClone, SourceSessionHandle, VmMemoryHandle } from '../../native/types.js';
import { ownPagesPath, removeRegionFiles } from '../vm/ram-files.js';
import type { ManagedVm } from '../vm/vms.js';
import type { MigrationContext } from './context.js';
import type { SourceRecord } from './session-store.js';

/**
 * The delay from the transfer of the device state to the scan of the memory files. The scan takes a processor for some
 * 10 ms per GiB, and the guest runs on the target by then. With the scan in the blackout, the blackout of a 2 GiB guest
 * on two cores was 27 ms instead of 12.
 */
const SCAN_DELAY_MS = 20;

export class SourceSession {
  readonly record: SourceRecord;
  readonly #context: MigrationContext;
  readonly #vm: ManagedVm;
  #pages: SourceSessionHandle | null = null;
  /** The listener that serves `#pages`. */
  #listener: DataListenerHandle | null = null;
  /** Never rejects. */
  #closing: Promise<void> = Promise.resolve();
  #counters: Readonly<Record<string, number>> = {};
  #state: StateExport | null = null;
  #stopping: Promise<Omit<StopReply, 'stoppedForMs'>> | null = null;
  /** `#pages` notes which pages the VM writes, and has searched the files for holes by itself. */
  #isTracked = false;
  #scanTimer: NodeJS.Timeout | null = null;
  #transferring: Promise<{ deviceStateBytes: number }> | null = null;
  /** The reason why pages of a clone are lost, or null. */
  #loss: MigrationError | null = null;
  /**
   * True if the VM's device state has been transferred, so that the VM is stopped for good. This session has done it,
   * or after a restart the owner record says so.
   */
  #hasDeparted = false;

  private constructor(context: MigrationContext, record: SourceRecord, vm: ManagedVm) {
    this.#context = context;
    this.record = record;
    this.#vm = vm;
  }

  static async expose(context: MigrationContext, record: SourceRecord, vm: ManagedVm): Promise<SourceSession> {
    const source = new SourceSession(context, record, vm);
    if (vm.regions.length === 0)
      throw new MigrationError('UNSUPPORTED', `the memory of ${record.vm} is private, so it cannot be exposed`);
    await context.store.save(record);
    try {
      await source.#open(record.isTracked);
      source.#state = await vm.process.exportState();
    } catch (error) {
      await source.unexpose();
      throw error;
    }
    context.peers.warm(record.target).catch((error: unknown) => {
      context.log.warn(
        { session: record.session, err: toMigrationError(error) },
        'the connection to the target could not be opened in advance',
      );
    });
    return source;
  }

  /**
   * Resumes a session after a restart of the daemon. If the VM has departed, its memory is exposed again, unchanged
   * since the stop. Otherwise the session is only kept so that it can be undone.
   */
  static async resumeSession(
    context: MigrationContext,
    record: SourceRecord,
    vm: ManagedVm,
    hasDeparted: boolean,
  ): Promise<SourceSession> {
    const source = new SourceSession(context, record, vm);
    source.#hasDeparted = hasDeparted;
    try {
      if (hasDeparted) await source.#reopen();
      else if (record.isTracked === true) await source.#endTracking();
    } catch (error) {
      // The session is kept, so that a caller who asks for the missing pages gets the reason.
      if (!source.#isLost(error)) throw error;
      source.#loss = toMigrationError(error);
    }
    return source;
  }

  /**
   * Exposes the memory of a departed VM again if its listener is lost, because the network device was removed, or if
   * only now it is known that the VM has departed.
   */
  async renew(hasDeparted: boolean): Promise<void> {
    if (hasDeparted) this.#hasDeparted = true;
    if (!this.#hasDeparted) return;
    this.#refuseIfLost();
    if (this.#pages !== null && this.#listener?.isLost !== true) return;
    this.#closePages();
    await this.#reopen();
  }

  get endpoint(): SourceEndpointInfo {
    const { transport } = this.record;
    if (this.#pages === null || this.#listener === null)
      throw new MigrationError('CONFLICT', `${this.record.vm} is no longer exposed`);
    return { transport, ...this.#context.transports.place(transport, this.#listener), keys: this.#pages.keys };
  }

  /**
   * Each call makes a round of its own, and none is repeated: the pages of a round that the target does not take back
   * would stay there as they were. So a move whose round gets lost must be undone.
   */
  async noteDirty(): Promise<DirtyRound> {
    const { vm } = this.record;
    if (this.#pages === null || !this.#isTracked) throw new MigrationError('CONFLICT', `writes of ${vm} are not noted`);
    if (this.#stopping !== null) throw new MigrationError('CONFLICT', `${vm} is being stopped`);
    return this.#pages.noteDirty(false);
  }

  /** The VM runs during most of this call. `stoppedForMs` is the time since it was stopped. */
  async stop(): Promise<StopReply> {
    this.#stopping ??= this.#stopOnce().catch((error: unknown) => {
      this.#stopping = null;
      throw error;
    });
    const stopped = await this.#stopping;
    return { ...stopped, stoppedForMs: Math.max(0, Date.now() - stopped.stoppedAtUs / 1000) };
  }

  transferState(target: string): Promise<{ deviceStateBytes: number }> {
    if (target !== this.record.target) {
      throw new MigrationError('CONFLICT', `the target of the session is ${this.record.target}, not ${target}`);
    }
    this.#transferring ??= this.#transferOnce().catch((error: unknown) => {
      this.#transferring = null;
      throw error;
    });
    return this.#transferring;
  }

  /** Digests memory as it was at the stop. */
  async digest(key: string, range: ChunkRange): Promise<FrozenDigests> {
    if (!this.#hasDeparted || this.#pages === null)
      throw new MigrationError('CONFLICT', `the memory of ${this.record.vm} is not frozen`);
    const digests = await this.#pages.digestChunks({ key, ...range });
    return { digests: digests.toString('base64') };
  }

  /**
   * Must be called before the VM runs again. It closes the page session, whose data map holds only for a stopped VM.
   * The session cannot be used any more.
   */
  endBeforeRun(): void {
    this.#hasDeparted = false;
    this.#closePages();
    this.#endHandover();
  }

  /** Idempotent. */
  async unexpose(): Promise<void> {
    // The files may be all that is left of a clone that has departed.
    const isKept = this.#hasDeparted;
    this.endBeforeRun();
    await this.#closing;
    if (this.#isClone && !isKept) await removeRegionFiles(this.#context.vms.place, this.#vm.spec);
    await this.#state?.close();
    this.#state = null;
    await this.#context.store.remove(this.record);
  }

  /** Called when the daemon exits. The next daemon resumes the session. */
  async close(): Promise<void> {
    this.endBeforeRun();
    await this.#state?.close();
    await this.#closing;
  }

  counters(): Readonly<Record<string, number>> {
    const read = this.#pages?.snapshot().counters;
    if (read !== undefined) {
      this.#counters = Object.fromEntries(Object.entries(read).map(([name, value]) => [name, Number(value)]));
    }
    return this.#counters;
  }

  async #open(isTracked = false): Promise<void> {
    const { native, transports } = this.#context;
    const { transport, session, token } = this.record;
    await this.#closing;
    const served = await transports.served(transport);
    const { regions } = this.#vm;
    const clone = await this.#clone();
    const options = { ...served, session, token, regions, ...clone, ...(isTracked ? this.#tracked() : {}) };
    this.#pages = await transports.registering(transport, () => native.openSourceSession(options));
    this.#isTracked = isTracked;
    this.#listener = served.listener;
  }

  /** Throws VM_LOST if a clone's process has ended before its pages were copied from it. */
  #refuseIfLost(): void {
    const failure = this.#pages?.snapshot().failure ?? null;
    const error = failure === null ? this.#loss : failureToError(failure, 'reading its pages');
    if (error === null || !this.#isLost(error)) return;
    const { vm, target } = this.record;
    throw new MigrationError(
      'VM_LOST',
      `the source QEMU of ${vm} has ended with pages that ${target} has not fetched`,
      {
        remedy:
          `the VM on ${target} waits for these pages for ever: run "vmctl stop --force ${vm}" there ` +
          `and "vmctl stop ${vm}" on this host`,
        cause: error,
      },
    );
  }

  #isLost(error: unknown): boolean {
    return this.#isClone && toMigrationError(error).code === 'QEMU_GONE';
  }

  get #isClone(): boolean {
    return this.#vm.spec.memory.backing === 'image';
  }

  /**
   * Returns the options for a clone: its memory is that of an image, and the pages it has written are in its process.
   */
  async #clone(): Promise<{ clone?: SourceClone }> {
    if (!this.#isClone) return {};
    const { vms } = this.#context;
    const { name, memory } = this.#vm.spec;
    const isOver = vms.exitOf(name) !== null;
    if (!isOver && this.#vm.memory === null) {
      throw new MigrationError(
        'UNSUPPORTED',
        `the pages that ${name} has written are in no file, and cannot be read without the preload`,
      );
    }
    const ownPaths = memory.regions.map(({ id }) => ownPagesPath(vms.place, name, id));
    for (const path of ownPaths) await mkdir(dirname(path), { recursive: true, mode: 0o700 });
    return { clone: { vm: isOver ? null : this.#vm.memory, ownPaths, isResume: this.#hasDeparted } };
  }

  #tracked(): { tracked: VmMemoryHandle } {
    const { memory, spec } = this.#vm;
    if (memory !== null && !this.#isClone) return { tracked: memory };
    throw new MigrationError('UNSUPPORTED', `the writes of ${spec.name} cannot be noted while it runs`);
  }

  /** The daemon that has begun to note writes has ended. While they are noted, nobody else may have the memory. */
  async #endTracking(): Promise<void> {
    const { memory } = this.#vm;
    if (memory !== null) await this.#context.native.releaseTracked(memory);
  }

  async #reopen(): Promise<void> {
    await this.#open();
    if (this.#hasDeparted) this.#scan();
    else this.#closePages();
  }

  async #stopOnce(): Promise<Omit<StopReply, 'stoppedForMs'>> {
    const { vms, log } = this.#context;
    const { session, vm } = this.record;
    const state = this.#state;
    if (state === null || this.#pages === null) throw new MigrationError('CONFLICT', `${vm} is not exposed`);
    // The state is written while the vCPUs still run. If QEMU dies from here on, the VM's memory files are kept until
    // the job has decided which host owns the VM.
    await vms.setState(vm, 'departed');
    // The session may have been undone during the write. The undo has resumed the VM and would not do it again.
    if (this.#pages === null) throw new MigrationError('CONFLICT', `${vm} is no longer exposed`);
    const calledAtMs = performance.now();
    const { stoppedAtUs } = await state.stop((stream) => this.#send(stream));
    log.debug(
      { session, callMs: performance.now() - calledAtMs, stoppedForMs: Date.now() - stoppedAtUs / 1000 },
      'stopped',
    );
    if (!this.#isTracked) return { stoppedAtUs };
    // No vCPU runs and no disk request is under way, so this is the last round.
    if (this.#pages === null) throw new MigrationError('CONFLICT', `${vm} is no longer exposed`);
    return { stoppedAtUs, dirty: await this.#pages.noteDirty(true) };
  }

  async #send(stream: StateStream): Promise<number> {
    const { session, target } = this.record;
    try {
      await this.#context.peers.sendState(target, session, stream);
      return stream.bytesRead;
    } catch (error) {
      stream.destroy();
      throw error;
    }
  }

  async #transferOnce(): Promise<{ deviceStateBytes: number }> {
    const state = this.#state;
    if (state === null) throw new MigrationError('CONFLICT', `${this.record.vm} is not exposed`);
    const beganAtMs = performance.now();
    const { deviceStateBytes, doneAtMs } = await state.transfer();
    await this.#refuseLateWrites();
    const parts = {
      sourceDoneMs: doneAtMs - beganAtMs,
      loadedMs: performance.now() - beganAtMs,
    };
    this.#context.log.debug({ session: this.record.session, deviceStateBytes, ...parts }, 'device state handed over');
    this.#hasDeparted = true;
    if (!this.#isTracked) this.#scanTimer = setTimeout(() => this.#scan(), SCAN_DELAY_MS);
    return { deviceStateBytes };
  }

  /**
   * QEMU's main loop runs on while the VM stands still: a client of the guest's serial ports may have put something
   * into its memory after the last round, and before the device state that says so was saved.
   */
  async #refuseLateWrites(): Promise<void> {
    if (!this.#isTracked || this.#pages === null || !(await this.#pages.hasChangedSinceLast())) return;
    throw new MigrationError('CONFLICT', `QEMU has written to the memory of ${this.record.vm} after it was stopped`, {
      remedy: 'move it again',
      isRetryable: true,
    });
  }

  /** Scans the memory files for holes, so that the target can fetch the other pages ahead of its faults. */
  #scan(): void {
    try {
      this.#pages?.scan();
    } catch (error) {
      const err = toMigrationError(error);
      this.#context.log.error(
        { session: this.record.session, err },
        'the memory files cannot be scanned for holes: the target gets pages on demand only',
      );
    }
  }

  #closePages(): void {
    if (this.#scanTimer !== null) clearTimeout(this.#scanTimer);
    this.#scanTimer = null;
    this.counters();
    const { session } = this.record;
    const failure = this.#pages?.snapshot().failure ?? null;
    if (failure !== null) {
      const err = failureToError(failure, 'after the switchover');
      const what = this.#isLost(err)
        ? `the pages that ${this.record.vm} has written were not all copied from its process`
        : `the memory files of ${this.record.vm} were not scanned for holes`;
      this.#context.log.warn({ session, err }, what);
    }
    const closing = this.#pages?.close().catch((error: unknown) => {
      this.#context.log.error({ session, err: toMigrationError(error) }, 'the source page session cannot be closed');
    });
    this.#closing = closing ?? this.#closing;
    this.#pages = null;
    this.#isTracked = false;
    this.#listener = null;
  }

  #endHandover(): void {
    this.#state?.end();
    this.#stopping = null;
    this.#transferring = null;
  }
}

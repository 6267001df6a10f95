/**
 * A VM that leaves: its memory exposed to the target, its vCPUs stopped, its device state handed over
 * (StateExport). Once the stream is complete QEMU does not let the VM run on by itself: that is why only a
 * complete transfer may be committed.
 */
import { mkdir } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { StateExport, StateStream } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { SourceEndpointInfo } from '../../engine/ports/session.js';
import { failureToError } from '../../native/failure.js';
import type { DataListenerHandle, SourceClone, SourceSessionHandle } from '../../native/types.js';
import { ownPagesPath, removeRegionFiles } from '../vm/ram-files.js';
import type { ManagedVm } from '../vm/vms.js';
import type { MigrationContext } from './context.js';
import type { SourceRecord } from './session-store.js';

/**
 * From the handover until the memory files are scanned, which takes a processor for some 10 ms a GiB: by then the guest
 * runs on the target. With the scan in the blackout that of a 2 GiB guest on two cores was 27 ms instead of 12.
 */
const SCAN_DELAY_MS = 20;

export class SourceSession {
  readonly record: SourceRecord;
  readonly #context: MigrationContext;
  readonly #vm: ManagedVm;
  #pages: SourceSessionHandle | null = null;
  /** Where `#pages` is served. */
  #listener: DataListenerHandle | null = null;
  /** Never rejects. */
  #closing: Promise<void> = Promise.resolve();
  #counters: Readonly<Record<string, number>> = {};
  #state: StateExport | null = null;
  #stopping: Promise<{ stoppedAtUs: number }> | null = null;
  #scanTimer: NodeJS.Timeout | null = null;
  #transferring: Promise<{ deviceStateBytes: number }> | null = null;
  /** Why pages of a clone can be had no more. */
  #loss: MigrationError | null = null;
  /**
   * The VM's device state has been handed over, so it stands still: by our own doing or, after a restart, by the owner
   * record.
   */
  #hasDeparted = false;

  private constructor(context: MigrationContext, record: SourceRecord, vm: ManagedVm) {
    this.#context = context;
    this.record = record;
    this.#vm = vm;
  }

  static async expose(context: MigrationContext, record: SourceRecord, vm: ManagedVm): Promise<SourceSession> {
    const source = new SourceSession(context, record, vm);
    if (vm.regions.length === 0) throw new MigrationError('UNSUPPORTED', `the memory of ${record.vm} is not in files`);
    await context.store.save(record);
    try {
      await source.#open();
      source.#state = await vm.process.exportState();
    } catch (error) {
      await source.unexpose();
      throw error;
    }
    context.peers.warm(record.target).catch((error: unknown) => {
      context.log.warn(
        { session: record.session, err: toMigrationError(error) },
        'no connection to the target beforehand',
      );
    });
    return source;
  }

  /**
   * After a restart. A VM that has been committed away is exposed again as it was frozen; one that has not is only
   * known, to be undone.
   */
  static async takeUp(
    context: MigrationContext,
    record: SourceRecord,
    vm: ManagedVm,
    hasDeparted: boolean,
  ): Promise<SourceSession> {
    const source = new SourceSession(context, record, vm);
    source.#hasDeparted = hasDeparted;
    try {
      if (hasDeparted) await source.#openAgain();
    } catch (error) {
      // Known all the same, so that whoever asks for the rest hears why there is none.
      if (!source.#isLost(error)) throw error;
      source.#loss = toMigrationError(error);
    }
    return source;
  }

  /**
   * Exposes the memory of a VM that has departed anew where nobody can reach it any more: its device has been
   * taken away.
   */
  async renew(): Promise<void> {
    if (!this.#hasDeparted) return;
    this.#mustHavePages();
    if (this.#pages !== null && this.#listener?.isLost !== true) return;
    this.#closePages();
    await this.#openAgain();
  }

  get endpoint(): SourceEndpointInfo {
    const { transport } = this.record;
    if (this.#pages === null || this.#listener === null)
      throw new MigrationError('CONFLICT', `${this.record.vm} is not exposed any more`);
    const { host, port } = this.#context.transports.place(transport, this.#listener);
    return { transport, host, port, keys: this.#pages.keys };
  }

  /** The VM runs during most of this call; `stoppedForMs` says since when it does not. */
  async stop(): Promise<{ stoppedAtUs: number; stoppedForMs: number }> {
    this.#stopping ??= this.#stopOnce().catch((error: unknown) => {
      this.#stopping = null;
      throw error;
    });
    const { stoppedAtUs } = await this.#stopping;
    return { stoppedAtUs, stoppedForMs: Math.max(0, Date.now() - stoppedAtUs / 1000) };
  }

  transferState(target: string): Promise<{ deviceStateBytes: number }> {
    if (target !== this.record.target) {
      throw new MigrationError('CONFLICT', `the session goes to ${this.record.target}, not to ${target}`);
    }
    this.#transferring ??= this.#transferOnce().catch((error: unknown) => {
      this.#transferring = null;
      throw error;
    });
    return this.#transferring;
  }

  /**
   * Before the VM runs again: the data map is that of a VM that stands still, and dies. The session cannot be used any
   * more.
   */
  thaw(): void {
    this.#hasDeparted = false;
    this.#closePages();
    this.#endHandover();
  }

  /** Idempotent. */
  async unexpose(): Promise<void> {
    // Of a clone that has departed they may be all that is left of it.
    const isKept = this.#hasDeparted;
    this.thaw();
    await this.#closing;
    if (this.#isClone && !isKept) await removeRegionFiles(this.#context.vms.place, this.#vm.spec);
    await this.#state?.close();
    this.#state = null;
    await this.#context.store.remove(this.record);
  }

  /** The daemon goes; a next one takes the session up. */
  async close(): Promise<void> {
    this.thaw();
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

  async #open(): Promise<void> {
    const { native, transports } = this.#context;
    const { transport, session, token } = this.record;
    await this.#closing;
    const { provider, listener } = await transports.served(transport);
    const { regions } = this.#vm;
    const clone = await this.#clone();
    const options = { listener, provider, session, token, regions, ...clone };
    this.#pages = await transports.registering(transport, () => native.openSourceSession(options));
    this.#listener = listener;
  }

  /** VM_LOST if a clone's process has ended before its pages were copied from it. */
  #mustHavePages(): void {
    const failure = this.#pages?.snapshot().failure ?? null;
    const error = failure === null ? this.#loss : failureToError(failure, 'reading its pages');
    if (error === null || !this.#isLost(error)) return;
    const { vm, target } = this.record;
    throw new MigrationError('VM_LOST', `QEMU of ${vm} has ended here with pages that ${target} has not fetched`, {
      remedy: `the VM waits for them on ${target} for ever: "vmctl stop ${vm}" there and here`,
      cause: error,
    });
  }

  #isLost(error: unknown): boolean {
    return this.#isClone && toMigrationError(error).code === 'QEMU_GONE';
  }

  get #isClone(): boolean {
    return this.#vm.spec.memory.backing === 'image';
  }

  /** Its memory is that of an image, and what it has written since is in its process. */
  async #clone(): Promise<{ clone?: SourceClone }> {
    if (!this.#isClone) return {};
    const { vms } = this.#context;
    const { name, memory } = this.#vm.spec;
    const isOver = vms.exitOf(name) !== null;
    if (!isOver && this.#vm.memory === null) {
      throw new MigrationError('UNSUPPORTED', `what ${name} has written is in no file, and cannot be read`);
    }
    const ownPaths = memory.regions.map(({ id }) => ownPagesPath(vms.place, name, id));
    for (const path of ownPaths) await mkdir(dirname(path), { recursive: true, mode: 0o700 });
    return { clone: { vm: isOver ? null : this.#vm.memory, ownPaths, isResume: this.#hasDeparted } };
  }

  async #openAgain(): Promise<void> {
    await this.#open();
    if (this.#hasDeparted) this.#scan();
    else this.#closePages();
  }

  async #stopOnce(): Promise<{ stoppedAtUs: number }> {
    const { vms, log } = this.#context;
    const { session, vm } = this.record;
    const state = this.#state;
    if (state === null || this.#pages === null) throw new MigrationError('CONFLICT', `${vm} is not exposed`);
    // Written while the vCPUs still run: should QEMU die from here on, its memory files stay until somebody has decided
    // whose they are.
    await vms.setState(vm, 'departed');
    // Undone while the disk took its time: the VM has been told to run on, and nobody would tell it again.
    if (this.#pages === null) throw new MigrationError('CONFLICT', `${vm} is not exposed any more`);
    const calledAtMs = performance.now();
    const { stoppedAtUs } = await state.stop((stream) => this.#send(stream));
    log.debug(
      { session, callMs: performance.now() - calledAtMs, stoppedForMs: Date.now() - stoppedAtUs / 1000 },
      'stopped',
    );
    return { stoppedAtUs };
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
    const parts = {
      sourceDoneMs: doneAtMs - beganAtMs,
      loadedMs: performance.now() - beganAtMs,
    };
    this.#context.log.debug({ session: this.record.session, deviceStateBytes, ...parts }, 'device state handed over');
    this.#hasDeparted = true;
    this.#scanTimer = setTimeout(() => this.#scan(), SCAN_DELAY_MS);
    return { deviceStateBytes };
  }

  /** Looks for holes in the memory files, so that the target can fetch the rest ahead of its faults. */
  #scan(): void {
    try {
      this.#pages?.scan();
    } catch (error) {
      const err = toMigrationError(error);
      this.#context.log.error(
        { session: this.record.session, err },
        'holes cannot be looked for: pages come on demand only',
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
      this.#context.log.warn({ session, err }, 'holes were not looked for, or a clone’s own pages not kept');
    }
    const closing = this.#pages?.close().catch((error: unknown) => {
      this.#context.log.error({ session, err: toMigrationError(error) }, 'the memory cannot be closed');
    });
    this.#closing = closing ?? this.#closing;
    this.#pages = null;
    this.#listener = null;
  }

  #endHandover(): void {
    this.#state?.end();
    this.#stopping = null;
    this.#transferring = null;
  }
}

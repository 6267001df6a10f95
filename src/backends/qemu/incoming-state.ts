/** The device state on its way into a QEMU that waits for it, and QEMU's verdict on it. */
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import { finished, type Readable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { connectedQmp } from '../../agent/vm/connected-qmp.js';
import type { ManagedVm } from '../../agent/vm/vms.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { MigrationMode } from '../../domain/migration.js';
import { MigrationWatch } from './migration-watch.js';

const LOAD_TIMEOUT_MS = 120_000;
/** After the stream broke: how long QEMU may take to say that it had all of it. */
const VERDICT_MS = 1_000;
const NATIVE_POLL_MS = 2;

/** Where QEMU waits for the device state of a post-copy of ours. */
export function stateSocketPath(vm: ManagedVm): string {
  return join(vm.directory, 'state.sock');
}

export class IncomingState {
  readonly #vm: ManagedVm;
  readonly #mode: MigrationMode;
  #watch: MigrationWatch | null;
  #isAccepting = false;
  #isLoaded = false;
  #isRunning = false;
  #end: MigrationError | null = null;

  /**
   * `isTakenUp`: the VM is that of an earlier daemon, and QEMU is asked how far it is when somebody needs to know. Not
   * before: its main loop may wait for a page, and answers only once the session's faults are served.
   */
  constructor(vm: ManagedVm, mode: MigrationMode, isTakenUp: boolean) {
    this.#vm = vm;
    this.#mode = mode;
    this.#watch = isTakenUp ? null : new MigrationWatch(vm.qmp);
  }

  /** QEMU has loaded everything, as far as is known. */
  get isLoaded(): boolean {
    return this.#isLoaded;
  }

  /** An earlier daemon has made it run. */
  get isRunning(): boolean {
    return this.#isRunning;
  }

  /** QEMU's events. At once unless the VM is that of an earlier daemon. */
  watch(): MigrationWatch | Promise<MigrationWatch> {
    return this.#watch ?? this.#attach();
  }

  /** Whoever waits gets `error`. Idempotent. */
  end(error: MigrationError): void {
    this.#end ??= error;
    this.#watch?.end(this.#end);
  }

  /** `body` until its end into QEMU. Resolves when QEMU has loaded all of it. */
  async accept(body: Readable): Promise<void> {
    if (this.#isAccepting || this.#isLoaded || this.#mode !== 'postcopy') {
      body.destroy();
      throw new MigrationError('CONFLICT', 'the session does not wait for a device state');
    }
    this.#isAccepting = true;
    const socket = connect({ path: stateSocketPath(this.#vm) });
    try {
      await Promise.race([this.loaded(), pump(body, socket).then(() => this.loaded())]);
    } catch (error) {
      const failure = toMigrationError(error);
      if (failure.code !== 'DISCONNECTED') throw failure;
      // Cut off after its last byte, perhaps: QEMU knows.
      await this.loaded(VERDICT_MS).catch(() => {
        throw failure;
      });
    } finally {
      socket.destroySoon();
    }
  }

  async loaded(timeoutMs = LOAD_TIMEOUT_MS): Promise<void> {
    if (this.#isLoaded) return;
    try {
      const watch = await this.watch();
      if (this.#isLoaded) return;
      if (this.#mode === 'native-postcopy') await this.#packageLoaded(watch, timeoutMs);
      else await watch.reached('completed', timeoutMs);
    } catch (error) {
      const failure = toMigrationError(error);
      if (failure.code !== 'QEMU_GONE') throw failure;
      throw new MigrationError('QEMU_FAILED', 'QEMU has ended while it loaded the device state', { cause: failure });
    }
    this.#isLoaded = true;
  }

  async #attach(): Promise<MigrationWatch> {
    const qmp = await connectedQmp(this.#vm);
    const watch = this.#watch ?? new MigrationWatch(qmp);
    this.#watch = watch;
    if (this.#end !== null) watch.end(this.#end);
    const { status, running } = await qmp.execute('query-status');
    this.#isLoaded ||= status !== 'inmigrate';
    this.#isRunning = running;
    return watch;
  }

  /** QEMU's own post-copy says that it is under way before the device state is in; the run state says when it is. */
  async #packageLoaded(watch: MigrationWatch, timeoutMs: number): Promise<void> {
    const deadlineMs = performance.now() + timeoutMs;
    await watch.reached('postcopy-active', timeoutMs);
    while ((await this.#vm.qmp.execute('query-status')).status === 'inmigrate') {
      if (performance.now() > deadlineMs) throw new MigrationError('TIMEOUT', 'QEMU does not load the device state');
      await sleep(NATIVE_POLL_MS);
    }
  }
}

/**
 * Resolves when all of `body` has been handed over, or when QEMU has closed its end: it does so at the last byte that
 * it wants, often before our end of the stream has been noticed, and what that means only its events say. `body` is
 * always read to its end and never destroyed, so that the request it belongs to can still be answered. Rejects with
 * DISCONNECTED when `body` fails.
 */
function pump(body: Readable, socket: Socket): Promise<void> {
  return new Promise((resolve, reject) => {
    finished(body, { writable: false }, (cause) => {
      if (cause === undefined || cause === null) return resolve();
      socket.destroy();
      reject(new MigrationError('DISCONNECTED', 'the device state was cut off', { cause }));
    });
    socket.on('error', () => undefined);
    socket.once('close', () => {
      body.unpipe(socket);
      body.resume();
      resolve();
    });
    body.pipe(socket);
  });
}

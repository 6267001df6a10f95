/** Loads device state into a QEMU that waits for it, and follows QEMU's result. */

import type { Socket } from 'node:net';
import { type Duplex, finished, type Readable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { type MigrationMode, MODE_TRAITS } from '../../domain/migration.js';
import { connectUnix } from '../../kit/unix-socket.js';
import type { NativeArrival, StateImport } from '../backend.js';
import type { QemuConnection } from './connection.js';
import { configureIncoming } from './migration.js';
import { MigrationWatch } from './migration-watch.js';
import { connectHalfOpen, reopenStream } from './native-migration.js';

const LOAD_TIMEOUT_MS = 120_000;
/** After the stream has broken, QEMU may take this long to report that it has loaded all of it. */
const VERDICT_MS = 1_000;
const RESUME_TIMEOUT_MS = 10_000;
const NATIVE_POLL_MS = 2;

export class IncomingState implements StateImport {
  readonly #connection: QemuConnection;
  readonly #mode: MigrationMode;
  #watch: MigrationWatch | null;
  #isAccepting = false;
  #isLoaded = false;
  #isReopening = false;
  /** True if an earlier daemon has resumed the VM. */
  #isRunning = false;
  #end: MigrationError | null = null;

  /**
   * `isReattached` is true if an earlier daemon launched the VM. Then QEMU is queried only when a caller needs the
   * answer.
   * Its main loop may wait for a page, and answers only once the session's faults are served.
   */
  constructor(connection: QemuConnection, mode: MigrationMode, isReattached: boolean) {
    this.#connection = connection;
    this.#mode = mode;
    this.#watch = isReattached ? null : new MigrationWatch(connection.qmp);
  }

  /** True if QEMU is known to have loaded the whole state. */
  get isLoaded(): boolean {
    return this.#isLoaded;
  }

  async listen(): Promise<void> {
    const { qmp, sockets } = this.#connection;
    const { mover, fetches } = MODE_TRAITS[this.#mode];
    const own = mover === 'backend' ? (fetches ? (['postcopy-ram'] as const) : []) : (['x-ignore-shared'] as const);
    await configureIncoming(qmp, ['events', 'late-block-activate', ...own]);
    await qmp.execute('migrate-incoming', { uri: `unix:${sockets.stateIn}` });
  }

  async openStream(): Promise<Duplex> {
    const { name } = this.#connection.place;
    if (MODE_TRAITS[this.#mode].mover !== 'backend' || this.#isLoaded)
      throw new MigrationError('CONFLICT', `${name} does not wait for a stream of QEMU`);
    return connectHalfOpen(this.#connection.sockets.stateIn);
  }

  async reopenStream(): Promise<Duplex> {
    if (!MODE_TRAITS[this.#mode].fetches) return this.openStream();
    if (this.#isReopening)
      throw new MigrationError('CONFLICT', 'the stream is being opened again', { isRetryable: true });
    this.#isReopening = true;
    try {
      return await reopenStream(await this.#connection.connected(), this.#connection.sockets.stateIn);
    } finally {
      this.#isReopening = false;
    }
  }

  attach(): Promise<void> | null {
    return this.#watch === null ? this.#attach().then(() => undefined) : null;
  }

  readyToRun(): () => Promise<number> {
    const watch = this.#watch;
    if (watch === null || !this.#isLoaded) {
      const { name } = this.#connection.place;
      throw new MigrationError('CONFLICT', `the device state of ${name} is not loaded`);
    }
    const { qmp } = this.#connection;
    return () => {
      // The event comes well before the answer, because vCPUs that all fault at once keep QEMU's main loop busy.
      const resumed = this.#isRunning ? Promise.resolve(Date.now() * 1000) : watch.resumed(RESUME_TIMEOUT_MS);
      const refused = qmp.execute('cont').then(() => resumed);
      return Promise.race([resumed, refused]);
    };
  }

  async nativeArrival(): Promise<NativeArrival> {
    const { status } = await (await this.#connection.connected()).execute('query-migrate');
    if (status === 'completed') return 'complete';
    return status === 'failed' ? 'failed' : 'filling';
  }

  /** Pending calls reject with `error`. Idempotent. */
  end(error: MigrationError): void {
    this.#end ??= error;
    this.#watch?.end(this.#end);
  }

  /** Passes `body` to QEMU. Resolves when QEMU has loaded all of it. */
  async accept(body: Readable): Promise<void> {
    if (this.#isAccepting || this.#isLoaded || MODE_TRAITS[this.#mode].mover === 'backend') {
      body.destroy();
      const { name } = this.#connection.place;
      throw new MigrationError('CONFLICT', `${name} does not wait for a device state`);
    }
    this.#isAccepting = true;
    const socket = connectUnix(this.#connection.sockets.stateIn);
    try {
      await Promise.race([this.loaded(), pump(body, socket).then(() => this.loaded())]);
    } catch (error) {
      const failure = toMigrationError(error);
      if (failure.code !== 'DISCONNECTED') throw failure;
      // The stream may have been cut off after its last byte. QEMU then reports that it has loaded everything.
      await this.loaded(VERDICT_MS).catch(() => {
        throw failure;
      });
    } finally {
      socket.destroySoon();
    }
  }

  /** Throws QEMU_FAILED if QEMU ends meanwhile. */
  async loaded(timeoutMs = LOAD_TIMEOUT_MS): Promise<void> {
    if (this.#isLoaded) return;
    try {
      const watch = this.#watch ?? (await this.#attach());
      if (this.#isLoaded) return;
      const { mover, fetches } = MODE_TRAITS[this.#mode];
      if (mover === 'backend' && fetches) await this.#packageLoaded(watch, timeoutMs);
      else await watch.reached('completed', timeoutMs);
    } catch (error) {
      const failure = toMigrationError(error);
      if (failure.code !== 'QEMU_GONE') throw failure;
      throw new MigrationError('QEMU_FAILED', 'QEMU ended while it loaded the device state', { cause: failure });
    }
    this.#isLoaded = true;
  }

  async #attach(): Promise<MigrationWatch> {
    const qmp = await this.#connection.connected();
    const watch = this.#watch ?? new MigrationWatch(qmp);
    this.#watch = watch;
    if (this.#end !== null) watch.end(this.#end);
    const { status, running } = await qmp.execute('query-status');
    this.#isLoaded ||= status !== 'inmigrate';
    this.#isRunning = running;
    return watch;
  }

  /** Native post-copy reports `postcopy-active` before the device state is loaded. The run state shows when it is. */
  async #packageLoaded(watch: MigrationWatch, timeoutMs: number): Promise<void> {
    const deadlineMs = performance.now() + timeoutMs;
    await watch.reached('postcopy-active', timeoutMs);
    while ((await this.#connection.qmp.execute('query-status')).status === 'inmigrate') {
      if (performance.now() > deadlineMs) {
        throw new MigrationError('TIMEOUT', `QEMU has not loaded the device state within ${timeoutMs} ms`);
      }
      await sleep(NATIVE_POLL_MS);
    }
  }
}

/**
 * Resolves when all of `body` has been written, or when QEMU has closed the socket. QEMU closes it after the last byte
 * that it needs, often before it has seen the end of the stream. Only QEMU's events show whether the load succeeded.
 * `body` is always read to its end and never destroyed, so that its HTTP request can still be answered. Rejects with
 * DISCONNECTED if `body` fails.
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

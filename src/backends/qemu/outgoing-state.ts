/**
 * Exports the device state of a QEMU, for an outgoing VM and for a fork.
 *
 * QEMU's stream starts while the VM still runs (pause-before-switchover). QEMU connects and sends everything that is
 * neither shared RAM nor device state. Then it stops the vCPUs itself and waits for `migrate-continue`. So only the
 * device state is saved while the VM is stopped. If the stream breaks before it is complete, QEMU resumes the VM by
 * itself. After that it never does.
 */
import { once } from 'node:events';
import { unlink } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../../domain/errors.js';
import { listenUnix } from '../../kit/unix-socket.js';
import type { StateConsumer, StateExport } from '../backend.js';
import type { QemuConnection } from './connection.js';
import { configureOutgoing } from './migration.js';
import { MigrationWatch } from './migration-watch.js';
import type { QmpClient } from './qmp/client.js';

const STOP_TIMEOUT_MS = 10_000;
const TRANSFER_TIMEOUT_MS = 120_000;
const RESUME_TIMEOUT_MS = 10_000;
const FINAL_POLL_MS = 1;

interface Handover {
  readonly watch: MigrationWatch;
  /** Resolves with the number of bytes when the consumer has the whole stream. */
  readonly sent: Promise<number>;
}

export class OutgoingState implements StateExport {
  readonly #connection: QemuConnection;
  readonly #server: Server;
  #handover: Handover | null = null;

  private constructor(connection: QemuConnection, server: Server) {
    this.#connection = connection;
    this.#server = server;
  }

  /** Configures QEMU and listens on the socket. The VM keeps running. */
  static async listen(connection: QemuConnection): Promise<OutgoingState> {
    await configureOutgoing(connection.qmp, ['events', 'x-ignore-shared', 'pause-before-switchover']);
    const path = connection.sockets.stateOut;
    const server = createServer();
    server.maxConnections = 1;
    await listenUnix(server, path);
    return new OutgoingState(connection, server);
  }

  /**
   * Resolves when the VM is stopped and its disks are drained. The VM runs during most of this call. `stoppedAtUs` is
   * by
   * QEMU's clock.
   */
  async stop(consume: StateConsumer): Promise<{ stoppedAtUs: number }> {
    const watch = new MigrationWatch(this.#connection.qmp);
    const sent = once(this.#server, 'connection').then(([socket]) => consume(socket as Socket));
    sent.catch(() => undefined);
    this.#handover = { watch, sent };
    await this.#connection.qmp.execute('migrate', { uri: `unix:${this.#connection.sockets.stateOut}` });
    // The STOP event is too early: pending disk requests may still write to guest memory until QEMU has drained them.
    await Promise.race([watch.reached('pre-switchover', STOP_TIMEOUT_MS), sent.then(endedEarly)]);
    const stoppedAtUs = watch.stoppedAtUs;
    if (stoppedAtUs === null) {
      throw new MigrationError('QEMU_FAILED', 'QEMU reported pre-switchover without a STOP event');
    }
    return { stoppedAtUs };
  }

  /**
   * Resolves when the consumer has the whole state and QEMU has finished sending. `doneAtMs` is the time of the latter,
   * by the daemon's clock. It may be earlier.
   */
  async transfer(): Promise<{ deviceStateBytes: number; doneAtMs: number }> {
    const handover = this.#handover;
    if (handover === null) throw new MigrationError('CONFLICT', `${this.#connection.place.name} has not been stopped`);
    const done = handover.watch.reached('completed', TRANSFER_TIMEOUT_MS).then(() => performance.now());
    const [doneAtMs, deviceStateBytes] = await Promise.all([
      done,
      handover.sent,
      this.#connection.qmp.execute('migrate-continue', { state: 'pre-switchover' }),
    ]);
    return { deviceStateBytes, doneAtMs };
  }

  async resume(): Promise<number> {
    const watch = this.#handover?.watch;
    if (watch === undefined)
      throw new MigrationError('CANCELLED', `the fork of ${this.#connection.place.name} was cancelled`);
    await continueWhenFinal(this.#connection.qmp);
    return watch.resumed(RESUME_TIMEOUT_MS);
  }

  /** Ends the attempt at any point. Another attempt may follow. Idempotent. */
  end(): void {
    this.#handover?.watch.end();
    this.#handover = null;
  }

  /** Idempotent. */
  async close(): Promise<void> {
    this.end();
    this.#server.close();
    await unlink(this.#connection.sockets.stateOut).catch(() => undefined);
  }
}

/** Called if the stream ends before QEMU has paused for the switchover, which no supported QEMU does. */
function endedEarly(): never {
  throw new MigrationError('QEMU_FAILED', 'QEMU ended its stream before the switchover');
}

/**
 * Resumes the VM after a complete migration. QEMU reports `completed` a moment before it accepts `cont`, and there is
 * no event for that moment.
 */
async function continueWhenFinal(qmp: QmpClient): Promise<void> {
  const deadlineMs = performance.now() + RESUME_TIMEOUT_MS;
  for (;;) {
    try {
      await qmp.execute('cont');
      return;
    } catch (error) {
      const { status } = await qmp.execute('query-status');
      if (status !== 'finish-migrate' || performance.now() > deadlineMs) throw error;
    }
    await sleep(FINAL_POLL_MS);
  }
}

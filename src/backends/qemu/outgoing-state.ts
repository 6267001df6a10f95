/**
 * The device state on its way out of a QEMU, for a VM that leaves and for one that is forked.
 *
 * QEMU's stream is started while the VM still runs (pause-before-switchover): QEMU connects, sends what is neither
 * shared RAM nor device state, then stops the vCPUs itself and waits for `migrate-continue`. So while the VM stands
 * still only device state proper is saved. If the stream breaks before it is complete QEMU lets the VM run on by
 * itself; once it is complete, never.
 */
import { once } from 'node:events';
import { unlink } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../../domain/errors.js';
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
  /** Until the consumer has all of it; the bytes that it was. */
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

  /** QEMU is set up and our end listens; the VM runs on. */
  static async listen(connection: QemuConnection): Promise<OutgoingState> {
    await configureOutgoing(connection.qmp, ['events', 'x-ignore-shared', 'pause-before-switchover']);
    const path = connection.sockets.stateOut;
    await unlink(path).catch(() => undefined);
    const server = createServer();
    server.maxConnections = 1;
    server.listen(path);
    await once(server, 'listening');
    return new OutgoingState(connection, server);
  }

  /**
   * Resolves when the VM stands still, its disks drained. The VM runs during most of this call; QEMU's clock says when
   * it was stopped.
   */
  async stop(consume: StateConsumer): Promise<{ stoppedAtUs: number }> {
    const watch = new MigrationWatch(this.#connection.qmp);
    const sent = once(this.#server, 'connection').then(([socket]) => consume(socket as Socket));
    sent.catch(() => undefined);
    this.#handover = { watch, sent };
    await this.#connection.qmp.execute('migrate', { uri: `unix:${this.#connection.sockets.stateOut}` });
    // Not the STOP event: requests under way at the disks may still write into the guest's memory until QEMU has
    // drained them.
    await Promise.race([watch.reached('pre-switchover', STOP_TIMEOUT_MS), sent.then(endedEarly)]);
    const stoppedAtUs = watch.stoppedAtUs;
    if (stoppedAtUs === null) throw new MigrationError('QEMU_FAILED', 'QEMU waits for the switchover without a STOP');
    return { stoppedAtUs };
  }

  /**
   * Resolves when the consumer has all of the state and QEMU is done with it: `doneAtMs`, by our clock, which may be
   * sooner.
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
    if (watch === undefined) throw new MigrationError('CANCELLED', 'the fork has been given up');
    await continueWhenFinal(this.#connection.qmp);
    return watch.resumed(RESUME_TIMEOUT_MS);
  }

  /** The attempt is over, whatever it was at; another one may follow. Idempotent. */
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

/** Handed over before QEMU has paused for the switchover: no QEMU of ours does that. */
function endedEarly(): never {
  throw new MigrationError('QEMU_FAILED', 'QEMU has ended its stream before the switchover');
}

/**
 * QEMU says that its migration is complete a moment before it lets itself be continued; there is no event for that
 * moment.
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

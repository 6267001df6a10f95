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
import { join } from 'node:path';
import type { ManagedVm } from '../../agent/vm/vms.js';
import { MigrationError } from '../../domain/errors.js';
import { configureOutgoing } from './migration.js';
import { MigrationWatch } from './migration-watch.js';

const STOP_TIMEOUT_MS = 10_000;
const TRANSFER_TIMEOUT_MS = 120_000;

/** What is done with the stream. Resolves with its length when all of it has arrived where it is to go. */
export type StateConsumer = (socket: Socket) => Promise<number>;

interface Handover {
  readonly watch: MigrationWatch;
  /** Until the consumer has all of it; the bytes that it was. */
  readonly sent: Promise<number>;
}

export class OutgoingState {
  readonly #vm: ManagedVm;
  readonly #server: Server;
  #handover: Handover | null = null;

  private constructor(vm: ManagedVm, server: Server) {
    this.#vm = vm;
    this.#server = server;
  }

  /** QEMU is set up and our end listens; the VM runs on. */
  static async listen(vm: ManagedVm): Promise<OutgoingState> {
    await configureOutgoing(vm.qmp, ['events', 'x-ignore-shared', 'pause-before-switchover']);
    const path = socketPath(vm);
    await unlink(path).catch(() => undefined);
    const server = createServer();
    server.maxConnections = 1;
    server.listen(path);
    await once(server, 'listening');
    return new OutgoingState(vm, server);
  }

  /**
   * Resolves when the VM stands still, its disks drained. The VM runs during most of this call; QEMU's clock says when
   * it was stopped.
   */
  async stop(consume: StateConsumer): Promise<{ stoppedAtUs: number }> {
    const watch = new MigrationWatch(this.#vm.qmp);
    const sent = once(this.#server, 'connection').then(([socket]) => consume(socket as Socket));
    sent.catch(() => undefined);
    this.#handover = { watch, sent };
    await this.#vm.qmp.execute('migrate', { uri: `unix:${socketPath(this.#vm)}` });
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
    if (handover === null) throw new MigrationError('CONFLICT', `${this.#vm.spec.name} has not been stopped`);
    const done = handover.watch.reached('completed', TRANSFER_TIMEOUT_MS).then(() => performance.now());
    const [doneAtMs, deviceStateBytes] = await Promise.all([
      done,
      handover.sent,
      this.#vm.qmp.execute('migrate-continue', { state: 'pre-switchover' }),
    ]);
    return { deviceStateBytes, doneAtMs };
  }

  /** QEMU's events of this attempt; null before the stop. */
  get watch(): MigrationWatch | null {
    return this.#handover?.watch ?? null;
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
    await unlink(socketPath(this.#vm)).catch(() => undefined);
  }
}

function socketPath(vm: ManagedVm): string {
  return join(vm.directory, 'out.sock');
}

/** Handed over before QEMU has paused for the switchover: no QEMU of ours does that. */
function endedEarly(): never {
  throw new MigrationError('QEMU_FAILED', 'QEMU has ended its stream before the switchover');
}

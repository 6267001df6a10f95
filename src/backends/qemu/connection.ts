/**
 * The QMP connection to the QEMU of one VM, for as long as the daemon knows the VM. The connection may be opened late,
 * lost and reopened. Users of this class keep the same object throughout.
 */
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../../domain/errors.js';
import type { VmPlace } from '../backend.js';
import { QmpClient, type QmpConnectOptions } from './qmp/client.js';

const ANSWER_TIMEOUT_MS = 10_000;
const ANSWER_POLL_MS = 20;

/** The sockets of QEMU in VmPlace.socketDirectory. */
export interface QemuSockets {
  /** The QMP socket for the daemon, and a second one for users and other tools. */
  readonly qmp: string;
  readonly monitor: string;
  /** The sockets for incoming and outgoing device state. */
  readonly stateIn: string;
  readonly stateOut: string;
}

export function socketsIn(directory: string): QemuSockets {
  return {
    qmp: join(directory, 'qmp.sock'),
    monitor: join(directory, 'monitor.sock'),
    stateIn: join(directory, 'state.sock'),
    stateOut: join(directory, 'out.sock'),
  };
}

type Dial = (path: string, options: QmpConnectOptions) => Promise<QmpClient>;

export class QemuConnection {
  readonly place: VmPlace;
  readonly sockets: QemuSockets;
  readonly #dial: Dial;
  #client: QmpClient | null = null;
  /** True if a QEMU has been started and this object has not been closed. */
  #isUp = false;

  constructor(place: VmPlace, dial: Dial = (path, options) => QmpClient.connect(path, options)) {
    this.place = place;
    this.sockets = socketsIn(place.socketDirectory);
    this.#dial = dial;
  }

  /** Throws QEMU_GONE while there is no connection. */
  get qmp(): QmpClient {
    if (this.#client === null || this.#client.isClosed) throw this.#gone();
    return this.#client;
  }

  /** The current connection, or the last one if it is lost. */
  get latest(): QmpClient | null {
    return this.#client;
  }

  /** To be called when a QEMU has been started, so that `connected` waits for it. */
  started(): void {
    this.#isUp = true;
  }

  async open(options: QmpConnectOptions): Promise<QmpClient> {
    this.#isUp = true;
    const client = await this.#dial(this.sockets.qmp, options);
    this.#client = client;
    return client;
  }

  /** Waits for the QEMU of an earlier daemon. Throws QEMU_GONE on timeout, or at once if there is no QEMU. */
  async connected(): Promise<QmpClient> {
    const deadlineMs = performance.now() + ANSWER_TIMEOUT_MS;
    for (;;) {
      try {
        return this.qmp;
      } catch (error) {
        if (!this.#isUp || performance.now() > deadlineMs) throw error;
      }
      await sleep(ANSWER_POLL_MS);
    }
  }

  /** Closes the connection. QEMU keeps running. Idempotent. */
  close(): void {
    this.#isUp = false;
    this.#client?.close();
    this.#client = null;
  }

  #gone(): MigrationError {
    return new MigrationError('QEMU_GONE', `the QEMU of ${this.place.name} has ended or does not answer`);
  }
}

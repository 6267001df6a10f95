/**
 * The QMP connection to the QEMU of one VM, for as long as the daemon knows the VM: it may come late, be lost, and come
 * again, and whoever holds this need not know.
 */
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../../domain/errors.js';
import type { VmPlace } from '../backend.js';
import { QmpClient, type QmpConnectOptions } from './qmp/client.js';

const ANSWER_TIMEOUT_MS = 10_000;
const ANSWER_POLL_MS = 20;

/** Sockets that QEMU makes, in the VM's directory. */
export interface QemuSockets {
  /** QMP for the daemon, and another one for people and other tools. */
  readonly qmp: string;
  readonly monitor: string;
  /** The device state on its way in, and out. */
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
  /** There is a QEMU, as far as is known. */
  #isUp = false;

  constructor(place: VmPlace, dial: Dial = (path, options) => QmpClient.connect(path, options)) {
    this.place = place;
    this.sockets = socketsIn(place.directory);
    this.#dial = dial;
  }

  /** Throws QEMU_GONE while there is no connection. */
  get qmp(): QmpClient {
    if (this.#client === null || this.#client.isClosed) throw this.#gone();
    return this.#client;
  }

  /** The present connection, or the one that was lost last. */
  get latest(): QmpClient | null {
    return this.#client;
  }

  /** A QEMU has been started: it will answer. */
  started(): void {
    this.#isUp = true;
  }

  async open(options: QmpConnectOptions): Promise<QmpClient> {
    this.#isUp = true;
    const client = await this.#dial(this.sockets.qmp, options);
    this.#client = client;
    return client;
  }

  /** Waits for the QEMU of an earlier daemon. QEMU_GONE if it does not answer in time, at once if there is none. */
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

  /** QEMU goes on. Idempotent. */
  close(): void {
    this.#isUp = false;
    this.#client?.close();
    this.#client = null;
  }

  #gone(): MigrationError {
    return new MigrationError('QEMU_GONE', `the QEMU of ${this.place.name} has ended or does not answer`);
  }
}

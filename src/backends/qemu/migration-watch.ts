/**
 * Follows a migration of one QEMU by its events, so that nothing is polled while no vCPU runs. It needs the capability
 * `events`. It remembers events that come before a caller waits for them.
 */
import { MigrationError } from '../../domain/errors.js';
import { type Deferred, deferred } from '../../kit/deferred.js';
import type { QmpClient, QmpEvent } from './qmp/client.js';

export type MigrationStatus =
  | 'none'
  | 'setup'
  | 'active'
  | 'pre-switchover'
  | 'device'
  | 'postcopy-active'
  | 'completed'
  | 'cancelling'
  | 'cancelled'
  | 'failed'
  | (string & {});

interface Waiter {
  readonly isMet: () => boolean;
  readonly met: Deferred<void>;
}

export class MigrationWatch {
  /** The time by QEMU's wall clock, in µs. Null before the event. */
  stoppedAtUs: number | null = null;
  resumedAtUs: number | null = null;
  readonly #qmp: QmpClient;
  readonly #seen = new Set<MigrationStatus>();
  readonly #waiters = new Set<Waiter>();
  readonly #onEvent = (event: QmpEvent) => this.#note(event);
  /** Removes the listener, because many migration attempts may use one QMP connection. */
  readonly #forgetClosed: () => void;
  #ended: MigrationError | null = null;

  constructor(qmp: QmpClient) {
    this.#qmp = qmp;
    qmp.on('event', this.#onEvent);
    this.#forgetClosed = qmp.onClosed((error) => this.end(error));
  }

  has(status: MigrationStatus): boolean {
    return this.#seen.has(status);
  }

  /**
   * Resolves when QEMU has been in `status`. Rejects with QEMU_FAILED and QEMU's reason if the migration fails first,
   * or with TIMEOUT.
   */
  async reached(status: MigrationStatus, timeoutMs: number): Promise<void> {
    const isOver = () => this.#seen.has('failed') || this.#seen.has('cancelled');
    await this.#until(() => this.#seen.has(status) || isOver(), timeoutMs, `migration status ${status}`);
    if (this.#seen.has(status)) return;
    throw new MigrationError(
      'QEMU_FAILED',
      `QEMU's migration has ${this.#seen.has('failed') ? 'failed' : 'been cancelled'}${await this.#reason()}`,
    );
  }

  /** Resolves when the migration has completed, failed or been cancelled. */
  async over(timeoutMs: number): Promise<void> {
    const ends: MigrationStatus[] = ['completed', 'failed', 'cancelled'];
    await this.#until(() => ends.some((end) => this.#seen.has(end)), timeoutMs, 'the end of the migration');
  }

  /** Resolves when the vCPUs run (again). */
  async resumed(timeoutMs: number): Promise<number> {
    await this.#until(() => this.resumedAtUs !== null, timeoutMs, 'RESUME');
    return this.resumedAtUs ?? 0;
  }

  /** Stops listening. Pending calls reject with `error`. Idempotent. */
  end(error = new MigrationError('CANCELLED', 'the migration attempt has ended')): void {
    if (this.#ended !== null) return;
    this.#ended = error;
    this.#qmp.off('event', this.#onEvent);
    this.#forgetClosed();
    for (const { met } of this.#waiters) met.reject(error);
  }

  async #until(isMet: () => boolean, timeoutMs: number, what: string): Promise<void> {
    if (isMet()) return;
    if (this.#ended !== null) throw this.#ended;
    const met = deferred<void>();
    const waiter = { isMet, met };
    const timer = setTimeout(
      () => met.reject(new MigrationError('TIMEOUT', `no ${what} from QEMU within ${timeoutMs} ms`)),
      timeoutMs,
    );
    this.#waiters.add(waiter);
    try {
      await met.promise;
    } finally {
      clearTimeout(timer);
      this.#waiters.delete(waiter);
    }
  }

  async #reason(): Promise<string> {
    const reply = await this.#qmp.execute('query-migrate').catch(() => null);
    return reply?.['error-desc'] === undefined ? '' : `: ${reply['error-desc']}`;
  }

  #note(event: QmpEvent): void {
    if (event.name === 'MIGRATION') this.#seen.add(String(event.data['status']));
    else if (event.name === 'STOP') this.stoppedAtUs = event.timestampUs;
    else if (event.name === 'RESUME') this.resumedAtUs = event.timestampUs;
    else return;
    for (const { isMet, met } of this.#waiters) if (isMet()) met.resolve();
  }
}

/**
 * Fetches the pages of one incoming VM: the native target session, its connection, and the reconnects. A session ends
 * when it is complete or when the caller closes it. This file knows nothing of device state, owners or jobs.
 */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { SourceEndpointInfo } from '../../engine/ports/session.js';
import type { TargetSessionHandle, TargetSnapshot } from '../../native/types.js';
import type { TargetCounter } from '../../protocol/wire.js';
import type { HostContext } from '../vm/context.js';
import type { ManagedVm } from '../vm/vms.js';

const RETRY_MS_FIRST = 100;
const RETRY_MS_MAX = 5_000;
/** The counters that a reopened session starts at zero, so that this file adds the earlier values. */
const SUMMED: readonly TargetCounter[] = [
  'demandBytes',
  'prefetchBytes',
  'faultCount',
  'faultOnClaimedCount',
  'faultWaitNs',
  'cpuNs',
];

export interface PageSessionOptions {
  readonly session: string;
  readonly token: string;
  readonly bandwidthBytesPerS: number;
  /** True: use the presence maps of an earlier process. */
  readonly isResume: boolean;
  /** Called when every page has arrived. */
  readonly onComplete: () => void;
}

export class PageSession {
  readonly #context: HostContext;
  readonly #vm: ManagedVm;
  readonly #options: PageSessionOptions;
  #handle: TargetSessionHandle;
  #snapshot: TargetSnapshot;
  /** The counts of the handles that have been closed. */
  readonly #carried = new Map<TargetCounter, bigint>();
  #endpoint: SourceEndpointInfo | null = null;
  /** True if this handle has been connected and has not reported the loss of its connection. */
  #isConnected = false;
  #isServeWanted = false;
  #isFillWanted = false;
  #isServing = false;
  #isFilling = false;
  #isClosed = false;
  #connecting: Promise<void> | null = null;
  #retryTimer: NodeJS.Timeout | null = null;
  #retryMs = RETRY_MS_FIRST;
  /** The failure that was reported last. */
  #reported: { readonly reason: string; readonly pagesPresent: bigint } | null = null;

  constructor(context: HostContext, vm: ManagedVm, options: PageSessionOptions) {
    this.#context = context;
    this.#vm = vm;
    this.#options = options;
    this.#handle = this.#open(options.isResume);
    this.#snapshot = this.#handle.snapshot();
  }

  /** After the end it returns the last reading. */
  get snapshot(): TargetSnapshot {
    if (!this.#isClosed) this.#snapshot = this.#read();
    return this.#snapshot;
  }

  get isConnected(): boolean {
    return this.#isConnected;
  }

  /**
   * Connects to `endpoint`, now and after each loss of the connection. If the native session cannot continue (its keys
   * are from before a restart of the source's daemon), it is closed and reopened. The pages that have arrived stay.
   */
  async connect(endpoint: SourceEndpointInfo): Promise<void> {
    await this.#connecting?.catch(() => undefined);
    if (this.#isClosed) throw this.#closedError();
    const isNewEndpoint = JSON.stringify(endpoint) !== JSON.stringify(this.#endpoint);
    this.#endpoint = endpoint;
    if (this.#isConnected && !isNewEndpoint) return;
    await this.#connectOnce(isNewEndpoint);
  }

  /** Starts serving faults, but no prefetch, as soon as there is a connection. The VM does not run yet. */
  serveDemand(): void {
    this.#isServeWanted = true;
    this.#startWanted();
  }

  /** Starts serving faults and fetching the remaining pages, as soon as there is a connection. */
  start(): void {
    this.#isFillWanted = true;
    this.#startWanted();
  }

  /** Makes the next attempt to connect at once, if one is due. */
  hurry(): void {
    if (this.#retryTimer === null) return;
    this.#stopRetrying();
    this.#retryMs = 0;
    this.#retryLater();
  }

  /** Closes the session. Missing pages stay missing, and their faults wait. Idempotent. */
  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#snapshot = this.#read();
    this.#isClosed = true;
    this.#stopRetrying();
    await this.#handle.close();
  }

  #open(isResume: boolean): TargetSessionHandle {
    const { native, vms } = this.#context;
    const { memory, regions, spec } = this.#vm;
    if (memory === null)
      throw new MigrationError('UNSUPPORTED', `${spec.name} has no preload, so its missing pages cannot be served`);
    return native.openTargetSession(memory, {
      regions: regions.map((region, index) => ({
        ...region,
        presencePath: vms.presencePath(spec.name, spec.memory.regions[index]?.id ?? ''),
      })),
      bandwidthBytesPerS: this.#options.bandwidthBytesPerS,
      isResume,
      onEdge: () => this.#onEdge(),
    });
  }

  #connectOnce(isAnew: boolean): Promise<void> {
    const attempt = this.#connectNow(isAnew).finally(() => {
      this.#connecting = null;
    });
    this.#connecting = attempt;
    return attempt;
  }

  async #connectNow(isAnew: boolean): Promise<void> {
    const endpoint = this.#endpoint;
    if (endpoint === null)
      throw new MigrationError('CONFLICT', `session ${this.#options.session} has no endpoint of its source`);
    this.#stopRetrying();
    const { state } = this.#handle.snapshot();
    if (state === 'complete') return;
    if (state === 'failed' || (state === 'filling' && isAnew)) await this.#reopen();
    const { transport, host, port, keys } = endpoint;
    const { session, token } = this.#options;
    const { transports } = this.#context;
    const { provider, options, timeoutMs } = await transports.connection(transport, host);
    const source = { provider, host, port, options, keys, session, token };
    await transports
      .registering(transport, () => this.#handle.connect(source, timeoutMs))
      .catch((error: unknown) => {
        throw withMountHint(toMigrationError(error), host);
      });
    this.#isConnected = true;
    this.#retryMs = RETRY_MS_FIRST;
    this.#startWantedNow();
  }

  #read(): TargetSnapshot {
    const { counters, ...rest } = this.#handle.snapshot();
    const summed = { ...counters };
    for (const [counter, before] of this.#carried) summed[counter] += before;
    return { ...rest, counters: summed };
  }

  async #reopen(): Promise<void> {
    this.#isConnected = false;
    this.#isServing = false;
    this.#isFilling = false;
    const { counters } = this.#read();
    for (const counter of SUMMED) this.#carried.set(counter, counters[counter]);
    this.#carried.set('reconnectCount', counters.reconnectCount + 1n);
    await this.#handle.close();
    if (this.#isClosed) throw this.#closedError();
    this.#handle = this.#open(true);
  }

  /** Starts what the caller has asked for, or schedules a connect if there is no connection. */
  #startWanted(): void {
    if (this.#isConnected) this.#startWantedNow();
    else if (!this.#options.isResume || !this.#fillUnconnected()) this.#retryLater();
  }

  #startWantedNow(): void {
    if (this.#isFillWanted) this.#fill();
    else if (this.#isServeWanted && !this.#isServing) {
      this.#handle.serveDemand();
      this.#isServing = true;
    }
  }

  #fill(): void {
    if (this.#isFilling) return;
    this.#handle.start();
    this.#isFilling = true;
  }

  /**
   * Completes a resumed session that has every page already, without a connection. Returns false if pages are missing.
   */
  #fillUnconnected(): boolean {
    if (!this.#isFillWanted) return false;
    try {
      this.#fill();
      return true;
    } catch {
      return false;
    }
  }

  #onEdge(): void {
    if (this.#isClosed) return;
    const { state, failure } = this.snapshot;
    const { session } = this.#options;
    if (state === 'complete') {
      this.#stopRetrying();
      this.#options.onComplete();
    } else if (state === 'disconnected') {
      this.#isConnected = false;
      this.#context.log.warn({ session, failure }, 'the connection to the source is lost');
      this.#retryLater();
    } else if (state === 'failed') {
      this.#isConnected = false;
      this.#reportFailure(failure);
    }
  }

  /** Reports a failure once, although every reopened session meets it again, until pages arrive. */
  #reportFailure(failure: TargetSnapshot['failure']): void {
    const { pagesPresent } = this.snapshot.counters;
    const reason = JSON.stringify(failure);
    const isKnown = this.#reported?.reason === reason && this.#reported.pagesPresent === pagesPresent;
    this.#reported = { reason, pagesPresent };
    if (isKnown) return;
    const { session } = this.#options;
    this.#context.log.error({ session, failure }, 'the page session cannot continue; it is tried again');
  }

  /**
   * Retries with the last endpoint. The coordinator reconnects the session too, with current keys, but takes longer to
   * notice. The retry is enough for a short loss of the connection.
   */
  #retryLater(): void {
    if (this.#endpoint === null || this.#retryTimer !== null || this.#connecting !== null || this.#isClosed) return;
    this.#retryTimer = setTimeout(() => {
      this.#retryTimer = null;
      if (this.#isClosed || this.#isConnected || this.#connecting !== null) return;
      this.#connectOnce(false).catch((error: unknown) => {
        this.#context.log.debug(
          { session: this.#options.session, err: toMigrationError(error) },
          'the source still cannot be reached',
        );
        this.#retryLater();
      });
    }, this.#retryMs);
    this.#retryMs = Math.min(Math.max(this.#retryMs * 2, RETRY_MS_FIRST), RETRY_MS_MAX);
  }

  #stopRetrying(): void {
    if (this.#retryTimer !== null) clearTimeout(this.#retryTimer);
    this.#retryTimer = null;
  }

  #closedError(): MigrationError {
    return new MigrationError('CONFLICT', `session ${this.#options.session} has ended`);
  }
}

/**
 * A daemon that refuses the session on a socket of this machine is another one: the path names a different socket in
 * this daemon's mount namespace than in the source's.
 */
export function withMountHint(error: MigrationError, host: string): MigrationError {
  if (error.code !== 'UNAUTHENTICATED' || !host.startsWith('/')) return error;
  return new MigrationError(error.code, `${error.message}: the daemon that answers at ${host} is not the source's`, {
    remedy:
      'use --tcp; --shm needs both daemons in one mount namespace, or the same files under their state directories',
    isRetryable: error.isRetryable,
    details: error.details,
    cause: error,
  });
}

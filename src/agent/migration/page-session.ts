/**
 * The pages of one arriving VM: the native target session with its connection, and the patience to get it back. Whoever
 * has closed it or seen it complete is done with it; nothing here knows of device state, owners or jobs.
 */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { SourceEndpointInfo } from '../../engine/ports/session.js';
import type { TargetSessionHandle, TargetSnapshot } from '../../native/types.js';
import type { TargetCounter } from '../../protocol/wire.js';
import type { HostContext } from '../vm/context.js';
import type { ManagedVm } from '../vm/vms.js';

const RETRY_MS_FIRST = 100;
const RETRY_MS_MAX = 5_000;
/** What a session opened anew counts from zero again. */
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
  /** The presence maps of an earlier process are taken over. */
  readonly isResume: boolean;
  /** Every page is here. */
  readonly onComplete: () => void;
}

export class PageSession {
  readonly #context: HostContext;
  readonly #vm: ManagedVm;
  readonly #options: PageSessionOptions;
  #handle: TargetSessionHandle;
  #snapshot: TargetSnapshot;
  /** Counted by handles closed since. */
  readonly #carried = new Map<TargetCounter, bigint>();
  #endpoint: SourceEndpointInfo | null = null;
  /** The connection of this handle has been up and nothing has been heard of its end. */
  #isConnected = false;
  #isServeWanted = false;
  #isFillWanted = false;
  #isServing = false;
  #isFilling = false;
  #isClosed = false;
  #connecting: Promise<void> | null = null;
  #retryTimer: NodeJS.Timeout | null = null;
  #retryMs = RETRY_MS_FIRST;

  constructor(context: HostContext, vm: ManagedVm, options: PageSessionOptions) {
    this.#context = context;
    this.#vm = vm;
    this.#options = options;
    this.#handle = this.#open(options.isResume);
    this.#snapshot = this.#handle.snapshot();
  }

  /** Its last reading stays after the end. */
  get snapshot(): TargetSnapshot {
    if (!this.#isClosed) this.#snapshot = this.#read();
    return this.#snapshot;
  }

  get isConnected(): boolean {
    return this.#isConnected;
  }

  /**
   * Connects to `endpoint`, now and whenever the connection is lost. A session that cannot go on by itself (the keys
   * were those of an earlier life of the source's daemon) is opened anew; the pages it has stay.
   */
  async connect(endpoint: SourceEndpointInfo): Promise<void> {
    await this.#connecting?.catch(() => undefined);
    if (this.#isClosed) throw closed();
    const isNewEndpoint = JSON.stringify(endpoint) !== JSON.stringify(this.#endpoint);
    this.#endpoint = endpoint;
    if (this.#isConnected && !isNewEndpoint) return;
    await this.#connectOnce(isNewEndpoint);
  }

  /** Serve faults, and nothing else, from now on or as soon as there is a connection: the VM does not run yet. */
  serveDemand(): void {
    this.#isServeWanted = true;
    this.#go();
  }

  /** Serve faults and fetch the rest, from now on or as soon as there is a connection. */
  start(): void {
    this.#isFillWanted = true;
    this.#go();
  }

  /** Pages not yet here stay missing, and their faults wait. Idempotent. */
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
      throw new MigrationError('UNSUPPORTED', `${spec.name} has no preload: pages cannot be missing`);
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
    if (endpoint === null) throw new MigrationError('CONFLICT', 'the session has not been told where its source is');
    this.#stopRetrying();
    const { state } = this.#handle.snapshot();
    if (state === 'complete') return;
    if (state === 'failed' || (state === 'filling' && isAnew)) await this.#reopen();
    const { transport, host, port, keys } = endpoint;
    const { session, token } = this.#options;
    const { transports } = this.#context;
    const { provider, options, timeoutMs } = await transports.connection(transport);
    const source = { provider, host, port, options, keys, session, token };
    await transports.registering(transport, () => this.#handle.connect(source, timeoutMs));
    this.#isConnected = true;
    this.#retryMs = RETRY_MS_FIRST;
    this.#goConnected();
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
    if (this.#isClosed) throw closed();
    this.#handle = this.#open(true);
  }

  #go(): void {
    if (this.#isConnected) this.#goConnected();
    else if (!this.#options.isResume || !this.#fillUnconnected()) this.#retryLater();
  }

  #goConnected(): void {
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

  /** A session taken over with every page here needs no source any more. false: this one does. */
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
      this.#context.log.error({ session, failure }, 'the page session cannot go on by itself');
    }
  }

  /**
   * The coordinator connects us again too, with the keys of the day; a short cut of the line is over before it has
   * noticed.
   */
  #retryLater(): void {
    if (this.#endpoint === null || this.#retryTimer !== null || this.#connecting !== null || this.#isClosed) return;
    this.#retryTimer = setTimeout(() => {
      this.#retryTimer = null;
      if (this.#isClosed || this.#isConnected || this.#connecting !== null) return;
      this.#connectOnce(false).catch((error: unknown) => {
        this.#context.log.debug(
          { session: this.#options.session, err: toMigrationError(error) },
          'still no connection',
        );
        this.#retryLater();
      });
    }, this.#retryMs);
    this.#retryMs = Math.min(this.#retryMs * 2, RETRY_MS_MAX);
  }

  #stopRetrying(): void {
    if (this.#retryTimer !== null) clearTimeout(this.#retryTimer);
    this.#retryTimer = null;
  }
}

function closed(): MigrationError {
  return new MigrationError('CONFLICT', 'the session has ended');
}

/**
 * Fetches the pages of one incoming VM: the native target session, and when it starts. A session ends when it is
 * complete or when the caller closes it. This file knows nothing of device state, owners or jobs.
 */

import { MigrationError } from '../../domain/errors.js';
import type { SourceEndpointInfo } from '../../engine/ports/session.js';
import { type FetchedAhead, HOLD_MS_MAX } from '../../engine/ports/target.js';
import type { ArrivalTags } from '../../native/chunk-types.js';
import { failureToError } from '../../native/failure.js';
import type { TargetSessionHandle, TargetSnapshot, TouchOrder } from '../../native/types.js';
import type { TargetCounter } from '../../protocol/wire.js';
import type { HostContext } from '../vm/context.js';
import type { ManagedVm } from '../vm/vms.js';
import { PageLink } from './page-link.js';

/** The counters that a reopened session starts at zero, so that this file adds the earlier values. */
const SUMMED: readonly TargetCounter[] = [
  'demandBytes',
  'prefetchBytes',
  'pushBytes',
  'faultCount',
  'faultOnClaimedCount',
  'faultWaitNs',
  'cpuNs',
];

export interface PageSessionOptions {
  readonly session: string;
  readonly token: string;
  readonly bandwidthBytesPerS: number;
  /** As for the native session. */
  readonly order?: TouchOrder;
  readonly tags?: ArrivalTags;
  /** True: use the presence maps of an earlier process. */
  readonly isResume: boolean;
  /** True: pages are fetched while the VM still runs on the source. Absent: they are not. */
  readonly isAhead?: boolean;
  /** Called when every page has arrived. */
  readonly onComplete: () => void;
}

export class PageSession {
  readonly #context: HostContext;
  readonly #vm: ManagedVm;
  readonly #options: PageSessionOptions;
  readonly #link: PageLink<TargetSessionHandle>;
  #snapshot: TargetSnapshot;
  /** The counts of the handles that have been closed. */
  readonly #carried = new Map<TargetCounter, bigint>();
  #isServeWanted = false;
  #isFillWanted = false;
  #isServing = false;
  #isFilling = false;
  /** Pages are being fetched while the VM runs elsewhere, and some are still missing. */
  #isAhead = false;
  /** The native session has been told to end that when nothing is in flight. */
  #isHolding = false;
  #isTakingBack = false;
  /** Those who wait for the next edge. */
  readonly #wakers = new Set<() => void>();
  #isClosed = false;
  /** The failure that was reported last. */
  #reported: { readonly reason: string; readonly pagesPresent: bigint } | null = null;

  constructor(context: HostContext, vm: ManagedVm, options: PageSessionOptions) {
    this.#context = context;
    this.#vm = vm;
    this.#options = options;
    this.#link = new PageLink(context, {
      open: (isResume) => this.#open(isResume),
      isResume: options.isResume,
      reading: 'filling',
      onConnected: () => this.#startWantedNow(),
      onReplace: () => this.#carry(),
      fields: { session: options.session },
    });
    this.#snapshot = this.#link.reader.snapshot();
  }

  /** After the end it returns the last reading. */
  get snapshot(): TargetSnapshot {
    if (!this.#isClosed) this.#snapshot = this.#read();
    return this.#snapshot;
  }

  get isConnected(): boolean {
    return this.#link.isConnected;
  }

  /** Connects to `endpoint`, now and after each loss of the connection. */
  async connect(endpoint: SourceEndpointInfo): Promise<void> {
    const { session, token } = this.#options;
    await this.#link.connect({ session, token, endpoint });
  }

  /**
   * Fetches the missing pages while the VM runs elsewhere: begins, or goes on. Resolves when all are here, or after
   * `msMax`. `holds`: it waits a little longer then, until nothing is in flight. A lost connection is made again
   * meanwhile.
   */
  async fetchAhead(msMax: number, holds: boolean): Promise<FetchedAhead> {
    // The native session would let this thread wait.
    if (this.#isTakingBack) throw new MigrationError('CONFLICT', 'pages are being given up');
    if (!this.#isAhead) {
      this.#refuseUnlessIdle();
      this.#isAhead = true;
      this.#fetchAheadNow();
    } else if (this.#isHolding && this.#link.isConnected) this.#fetchAheadNow();
    await this.#aheadEnds(msMax);
    if (this.#isAhead && holds && this.#link.isConnected) {
      this.#isHolding = true;
      this.#link.reader.holdAhead();
      await this.#aheadEnds(HOLD_MS_MAX);
    }
    const { pageCount, pagesPresent, pagesZero } = this.snapshot.counters;
    return { isDone: !this.#isAhead && pagesPresent + pagesZero === pageCount, isHeld: !this.#isAhead };
  }

  async #aheadEnds(msMax: number): Promise<void> {
    const deadlineMs = performance.now() + msMax;
    while (this.#isAhead) {
      if (this.#isClosed) throw new MigrationError('CONFLICT', 'the page session has ended');
      const { state, failure } = this.snapshot;
      if (state === 'failed' && failure !== null) throw failureToError(failure, 'fetching pages ahead');
      const leftMs = deadlineMs - performance.now();
      if (leftMs <= 0) return;
      await this.#edge(leftMs);
    }
  }

  /** Gives up the pages that the VM has written before this round was noted. */
  async takeBack(round: number): Promise<{ pages: number }> {
    if (this.#isAhead) throw new MigrationError('CONFLICT', 'pages are still being fetched ahead');
    this.#refuseUnlessIdle();
    this.#isTakingBack = true;
    try {
      return await this.#link.reader.takeBack(round);
    } finally {
      this.#isTakingBack = false;
    }
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
    this.#link.hurry();
  }

  /** Closes the session. Missing pages stay missing, and their faults wait. Idempotent. */
  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#snapshot = this.#read();
    this.#isClosed = true;
    this.#wake();
    await this.#link.close();
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
      ...(this.#options.order === undefined ? {} : { order: this.#options.order }),
      ...(this.#options.tags === undefined ? {} : { tags: this.#options.tags }),
      isResume,
      hasFetchedAhead: isResume && this.#options.isAhead === true,
      onEdge: () => this.#onEdge(),
    });
  }

  #read(): TargetSnapshot {
    const { counters, ...rest } = this.#link.reader.snapshot();
    const summed = { ...counters };
    for (const [counter, before] of this.#carried) summed[counter] += before;
    return { ...rest, counters: summed };
  }

  /** The native session will be replaced by another one, which counts from zero and has not started. */
  #carry(): void {
    this.#isServing = false;
    this.#isFilling = false;
    const { counters } = this.#read();
    for (const counter of SUMMED) this.#carried.set(counter, counters[counter]);
    this.#carried.set('reconnectCount', counters.reconnectCount + 1n);
  }

  /** Starts what the caller has asked for, or schedules a connect if there is no connection. */
  #startWanted(): void {
    if (this.#link.isConnected) this.#startWantedNow();
    else if (!this.#options.isResume || !this.#fillUnconnected()) this.#link.retryLater();
  }

  #startWantedNow(): void {
    if (this.#isFillWanted) this.#fill();
    else if (this.#isServeWanted && !this.#isServing) {
      this.#link.reader.serveDemand();
      this.#isServing = true;
    } else if (this.#isAhead) this.#fetchAheadNow();
  }

  #fetchAheadNow(): void {
    this.#isHolding = false;
    this.#link.reader.fetchAhead();
    this.#noteAhead();
  }

  /** Before its end the native session is in another state, and so is one whose connection is lost. */
  #noteAhead(): void {
    if (this.#isAhead && this.#link.isConnected && this.snapshot.state === 'idle') this.#isAhead = false;
  }

  #refuseUnlessIdle(): void {
    if (this.#isServeWanted || this.#isFillWanted)
      throw new MigrationError('CONFLICT', 'the VM does not run on its source any more');
    if (!this.#link.isConnected) throw new MigrationError('DISCONNECTED', 'the source is not connected');
  }

  #edge(msMax: number): Promise<void> {
    return new Promise((resolve) => {
      const wake = (): void => {
        clearTimeout(timer);
        this.#wakers.delete(wake);
        resolve();
      };
      const timer = setTimeout(wake, msMax);
      this.#wakers.add(wake);
    });
  }

  #wake(): void {
    for (const wake of [...this.#wakers]) wake();
  }

  #fill(): void {
    if (this.#isFilling) return;
    this.#link.reader.start();
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
    // The first edge may come before the constructor has stored the link.
    if (this.#isClosed || this.#link === undefined) return;
    const { state, failure } = this.snapshot;
    if (state === 'complete') {
      this.#link.stopRetrying();
      this.#options.onComplete();
    } else if (state === 'disconnected') {
      this.#link.noteLost(failure);
    } else if (state === 'failed') {
      this.#link.noteFailed();
      this.#reportFailure(failure);
    }
    this.#noteAhead();
    this.#wake();
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
}

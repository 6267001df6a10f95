/**
 * Reads an image from another host while clones of this host run on it. It is to a host that joins a fork what a
 * capture is to the host of the parent.
 */
import { unlink } from 'node:fs/promises';
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import type { HostFanout } from '../../../domain/fanout.js';
import type { ImageHolder } from '../../../engine/ports/fork.js';
import { deferred } from '../../../kit/deferred.js';
import { failureToError } from '../../../native/failure.js';
import type { ImageDigestsHandle, ImageFetchHandle, ImageFetchSnapshot, TouchOrder } from '../../../native/types.js';
import type { ImageCounter } from '../../../protocol/wire.js';
import type { ImageContext } from '../../image/context.js';
import type { ImageRecord } from '../../image/record.js';
import { PageLink } from '../../migration/page-link.js';
import type { ManagedVm } from '../../vm/vms.js';
import { DigestReader } from './digest-reader.js';
import { isFinal } from './failed-image.js';
import { takeSeat } from './multicast-reader.js';
import { joinOf } from './multicast-server.js';
import { NearHolders } from './near-holders.js';
import type { OriginHost } from './origin-host.js';
import { type CheckOutcome, damagedError, openDigests, PageCheck } from './page-check.js';
import { TouchKeeper } from './touch-keeper.js';

/** The counters that a native session opened anew starts at zero. The others are read from the presence maps. */
const SUMMED: readonly ImageCounter[] = [
  ...(['copiedBytes', 'demandBytes', 'prefetchBytes', 'cloneFaultCount', 'refusedPages', 'cpuNs'] as const),
  ...(['orderedBytes', 'nearBytes', 'absentAnswers', 'multicastBytes', 'multicastLostDatagrams'] as const),
];

export class FetchSession {
  readonly #context: ImageContext;
  readonly #image: ImageRecord;
  readonly #link: PageLink<ImageFetchHandle>;
  readonly #presencePaths: readonly string[];
  /** Null: they cannot be kept here, so no page is checked. */
  readonly #digests: ImageDigestsHandle | null;
  readonly #check: PageCheck;
  readonly #touch: TouchKeeper;
  readonly #filled = deferred<'complete' | 'failed'>();
  readonly #over = deferred<'complete' | 'failed'>();
  #isOver = false;
  /** Why the image can never be complete here. It stays, so that no later session hides it. */
  #failure: MigrationError | null = null;
  readonly #clones = new Set<ManagedVm>();
  /** Those of which the present native session knows. */
  readonly #known = new Set<ManagedVm>();
  readonly #carried = new Map<ImageCounter, bigint>();
  #last: ImageFetchSnapshot;
  readonly #options: FetchOptions;
  readonly #near: NearHolders;
  #isFeeding = false;
  /** The present native session has a seat in a multicast. */
  #isSeated = false;
  #multicastDatagrams = 0;
  #isServeWanted = false;
  #isSweepWanted = false;
  #isServing = false;
  #isOpen = true;

  private constructor(
    context: ImageContext,
    image: ImageRecord,
    files: ImageFiles,
    { digests, before }: { readonly digests: ImageDigestsHandle | null; readonly before: TouchOrder },
    options: FetchOptions,
  ) {
    this.#context = context;
    this.#image = image;
    this.#presencePaths = files.map(({ presencePath }) => presencePath);
    this.#digests = digests;
    this.#options = options;
    this.#link = new PageLink(context, {
      mayReplace: () => this.failure === null,
      open: (isAgain) =>
        context.native.openImageFetch({
          ...{ image: files, bandwidthBytesPerS: 0, isResume: isAgain, digests },
          onEdge: () => this.#onEdge(),
        }),
      isResume: options.isResume,
      findHolder: () => this.#findHolder(options.origin),
      reading: 'copying',
      onConnected: () => this.#startWanted(),
      onReplace: () => this.#carry(),
      fields: { image: image.id },
    });
    this.#near = new NearHolders(context, {
      ...{ image: image.id, levels: options.fanout?.levels ?? [], origin: options.origin },
      reader: () => this.#link.reader,
    });
    const { origin, fanout } = options;
    const reader = new DigestReader(context, { image: image.id, origin, relays: fanout?.digestRelays ?? [] });
    this.#check = new PageCheck({
      ...{ log: context.log, image: image.id, memory: image.spec.memory, digests },
      ask: (region, firstPage) => reader.ask(region, firstPage),
      check: (region, firstPage, count) => this.#link.reader.check(region, firstPage, count),
      isComplete: () => this.snapshot.state === 'complete',
      onOver: (outcome) => this.#checkIsOver(outcome),
    });
    this.#touch = new TouchKeeper(context.images, image, { before, read: () => this.#link.reader.touched() });
    this.#last = this.#link.reader.snapshot();
    context.images.setFilling(image.id, this);
  }

  static async open(context: ImageContext, image: ImageRecord, options: FetchOptions): Promise<FetchSession> {
    const files = await context.images.withPresence(image);
    const before = await context.images.orders.read(image);
    const digests = await openDigests(context, image, options);
    try {
      return new FetchSession(context, image, files, { digests, before }, options);
    } catch (error) {
      // It holds the files of the image, which may be about to go, for want of room.
      digests?.close();
      throw error;
    }
  }

  /**
   * Resolves when every page is here and has been checked, as far as its digest can be known; when the session has
   * failed; or when it is closed before.
   */
  get over(): Promise<'complete' | 'failed'> {
    this.#checkState();
    return this.#over.promise;
  }

  /** The same without the check. Private clones are filled from the image before it can be checked. */
  get filled(): Promise<'complete' | 'failed'> {
    this.#checkState();
    return this.#filled.promise;
  }

  get snapshot(): ImageFetchSnapshot {
    if (this.#isOpen) this.#last = this.#read();
    return this.#last;
  }

  /** Nothing more is to be done for the pages. */
  get isComplete(): boolean {
    return this.snapshot.state === 'complete' && this.#check.outcome !== null && this.failure === null;
  }

  /** Every page is what its digest says. */
  get isChecked(): boolean {
    return this.#check.outcome?.kind === 'checked';
  }

  /** The error that stopped the session for good, or null. */
  get failure(): MigrationError | null {
    this.#failure ??= this.#findFailure();
    return this.#failure;
  }

  #findFailure(): MigrationError | null {
    const { outcome } = this.#check;
    if (outcome?.kind === 'damaged') return damagedError(this.#image.id, outcome.page);
    const { state, failure } = this.snapshot;
    // One that was closed may have failed before.
    if (state !== 'failed' && (state !== 'closed' || failure === null)) return null;
    if (failure !== null) {
      const error = failureToError(failure, 'reading the image');
      // A holder that has been restarted refuses the session. The link asks for another one.
      return error.code === 'UNAUTHENTICATED' ? null : error;
    }
    return new MigrationError('NATIVE_FAILED', 'the image of the clones cannot be read');
  }

  /** Why no page comes at present, or why those that are here are not checked. Null: nothing is wrong. */
  get trouble(): MigrationError | null {
    return this.snapshot.state === 'complete' ? this.#check.trouble : this.#link.trouble;
  }

  get counters(): Readonly<Record<string, number>> {
    const { counters } = this.snapshot;
    const numbers = Object.fromEntries(Object.entries(counters).map(([name, value]) => [name, Number(value)]));
    return { ...numbers, checkedPages: this.#check.checkedPages, multicastDatagrams: this.#multicastDatagrams };
  }

  /** Bytes of pages that came from other hosts than the root, by host. */
  get nearBytes(): Readonly<Record<string, number>> {
    return this.#near.bytes;
  }

  /** For a host that wants to read what is here. Null: nothing is, or will be. */
  get handle(): ImageFetchHandle | null {
    return this.#isOpen && this.failure === null ? this.#link.reader : null;
  }

  get touched(): TouchOrder {
    return this.#touch.order;
  }

  get pagesDone(): number {
    const { pagesCopied, pagesZero } = this.snapshot.counters;
    return Number(pagesCopied) + Number(pagesZero);
  }

  /** Connects to a holder of the image, now and after each loss of the connection. Another holder replaces it. */
  async connect(holder: ImageHolder): Promise<void> {
    if (this.failure !== null) throw this.failure;
    await this.#link.connect(holder);
  }

  /** Serves the clones from now on, as soon as there is a connection. Only the pages that they ask for are read. */
  serve(): void {
    this.#isServeWanted = true;
    this.#check.start();
    this.#startIfPossible();
  }

  /** Brings the pages that no clone has asked for, too. Does not wait for them. Idempotent. */
  async sweep(): Promise<void> {
    this.serve();
    if (this.#isFeeding) return;
    this.#isFeeding = true;
    const { fanout, origin } = this.#options;
    this.#touch.tell(await origin.touchOrder());
    if (fanout === null) return this.#sweepRoot();
    this.#openFeeds(fanout)
      .then(() => this.#sweepRoot())
      .catch((error: unknown) => {
        this.#context.log.error({ image: this.#image.id, err: toMigrationError(error) }, 'the image is not swept');
      });
  }

  #sweepRoot(): void {
    this.#isSweepWanted = true;
    if (this.#isOpen) this.#startIfPossible();
  }

  /** Opens what brings pages sooner than the root. The native session reads from the root what they do not bring. */
  async #openFeeds(fanout: HostFanout): Promise<void> {
    // Whoever goes on after a restart lacks a part only, and a root that was restarted, too, would send it all again.
    if (fanout.kind === 'multicast' && !this.#options.isResume) await this.#joinMulticast(fanout);
    if (this.#isOpen) await this.#near.start();
  }

  async #joinMulticast({ provider = 'udp', datagramBytesMax = 0 }: HostFanout): Promise<void> {
    await takeSeat({
      ...{ image: this.#image.id, clock: this.#context.clock, log: this.#context.log },
      isOver: () => !this.#isOpen || this.#isOver,
      ask: () => this.#options.origin.joinMulticast(provider, datagramBytesMax),
      join: async (seat) => {
        await this.#link.reader.joinMulticast(await joinOf(this.#context, seat));
        this.#isSeated = true;
      },
    });
  }

  /** Does nothing for a clone that has ended. */
  addClone(vm: ManagedVm): void {
    if (vm.memory === null || this.#known.has(vm)) return;
    this.#clones.add(vm);
    this.#link.reader.addClone(vm.memory);
    this.#known.add(vm);
  }

  removeClone(vm: ManagedVm): void {
    this.#clones.delete(vm);
    if (!this.#known.delete(vm) || vm.memory === null || !this.#isOpen) return;
    this.#link.reader.removeClone(vm.memory);
  }

  /** Closes a session that is over, and removes its presence maps. Only the image is left. */
  async finish(): Promise<void> {
    await this.#end({ isLost: false });
    for (const path of this.#presencePaths) {
      await unlink(path).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error;
      });
    }
  }

  /** Closes a session that is given up. The caller removes the files. */
  async abandon(): Promise<void> {
    await this.#end({ isLost: true });
  }

  /** Closes the session and leaves everything in place for the next daemon. */
  async leave(): Promise<void> {
    await this.#end({ isLost: false });
  }

  async #end(fate: { readonly isLost: boolean }): Promise<void> {
    this.#context.images.setFilling(this.#image.id, null);
    if (!this.#isOpen) return;
    this.#last = this.#read();
    this.#near.close();
    this.#isOpen = false;
    // Nobody waits any longer. It changes nothing if the image is complete.
    this.#resolve('failed');
    await this.#touch.close(fate);
    await Promise.all([this.#check.close(), this.#link.close()]);
    this.#digests?.close();
  }

  #read(): ImageFetchSnapshot {
    const { counters, ...rest } = this.#link.reader.snapshot();
    if (this.#isSeated) this.#multicastDatagrams = Number(this.#link.reader.multicast().receivedDatagrams);
    const summed = { ...counters };
    for (const [counter, before] of this.#carried) summed[counter] += before;
    return { ...rest, counters: summed };
  }

  #carry(): void {
    this.#isServing = false;
    this.#near.forgetReader();
    this.#touch.carry();
    const { counters } = this.#read();
    this.#isSeated = false;
    for (const counter of SUMMED) this.#carried.set(counter, counters[counter]);
    this.#carried.set('reconnectCount', counters.reconnectCount + 1n);
    for (const { memory } of this.#known) if (memory !== null) this.#link.reader.removeClone(memory);
    this.#known.clear();
  }

  /** A session that an earlier daemon has filled to the end needs no holder. */
  #startIfPossible(): void {
    if (this.#link.isConnected) return this.#startWanted();
    try {
      this.#startWanted();
    } catch {
      // Another holder does not help a session that has failed for good, and would hide the failure.
      if (this.failure === null) this.#link.retryLater();
    }
  }

  #startWanted(): void {
    const { reader } = this.#link;
    if (!this.#isServing && this.#isServeWanted) {
      for (const vm of this.#clones) this.addClone(vm);
      reader.start();
      this.#isServing = true;
    }
    if (this.#isServing && this.#isSweepWanted) reader.sweep(this.#touch.order);
  }

  #onEdge(): void {
    // The first edge may come before the constructor has stored the link.
    if (!this.#isOpen || this.#link === undefined) return;
    this.#checkState();
    const { state, failure } = this.snapshot;
    if (state === 'complete') {
      this.#link.stopRetrying();
      this.#check.hurry();
    }
    if (state === 'disconnected') this.#link.noteLost(failure);
    if (state === 'failed') this.#link.noteFailed();
  }

  #checkIsOver(outcome: CheckOutcome): void {
    const { log } = this.#context;
    if (outcome.kind === 'unknown') {
      log.warn({ image: this.#image.id, err: outcome.error }, 'the pages of an image cannot be checked');
    }
    if (outcome.kind === 'failed') this.#failure ??= outcome.error;
    this.#checkState();
  }

  #checkState(): void {
    if (this.failure !== null) return this.#resolve('failed');
    if (this.snapshot.state === 'complete') this.#filled.resolve('complete');
    if (this.isComplete) this.#resolve('complete');
  }

  #resolve(outcome: 'complete' | 'failed'): void {
    this.#isOver = true;
    this.#filled.resolve(outcome);
    this.#over.resolve(outcome);
  }

  async #findHolder(origin: OriginHost): Promise<ImageHolder> {
    try {
      return await origin.findHolder();
    } catch (thrown) {
      const error = toMigrationError(thrown);
      if (isFinal(error)) this.#giveUp(error);
      throw error;
    }
  }

  #giveUp(refusal: MigrationError): void {
    if (!this.#isOpen || this.#isOver) return;
    this.#failure ??= refusal;
    this.#resolve('failed');
  }
}

export interface FetchOptions {
  /** An earlier daemon has read some of the pages. */
  readonly isResume: boolean;
  /** It is asked for a holder whenever there is none. */
  readonly origin: OriginHost;
  /** What brings pages sooner than the root. Null: nothing. */
  readonly fanout: HostFanout | null;
}

type ImageFiles = Awaited<ReturnType<ImageContext['images']['withPresence']>>;

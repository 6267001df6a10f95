/**
 * What brings the pages of a fork: the capture of a parent that continues to run, or another host's image that is read;
 * and the copies of private clones. A fork whose pages are all there has none of them.
 */

import { type ErrorJson, MigrationError, toMigrationError } from '../../domain/errors.js';
import type { HostFanout } from '../../domain/fanout.js';
import { type Transport, transportRow } from '../../domain/transport.js';
import type { ForkProgress } from '../../engine/ports/fork.js';
import type { ImageRecord } from '../image/record.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { CaptureSession } from './pages/capture-session.js';
import { failedImage } from './pages/failed-image.js';
import { FetchSession } from './pages/fetch-session.js';
import type { ImagePages } from './pages/image-server.js';
import { OriginHost } from './pages/origin-host.js';
import { PrivateCopies } from './pages/private-copies.js';
import type { ForkRecord } from './record.js';

/** How long the filling waits for the coordinator's first question. */
const FILL_MS_MAX = 500;

export class ForkPages {
  readonly #context: ForkContext;
  readonly #image: string;
  readonly #parent: ManagedVm | null;
  /** The clones have memory files of their own, which are filled from the complete image. */
  readonly isPrivate: boolean;
  /** The pages come after the fork point: the parent continues to run, or another host has them. */
  readonly isFilled: boolean;
  /** The host that has the image. Null: this host. */
  readonly #origin: OriginHost | null;
  readonly #wasCommitted: boolean;
  /** Only what the clones touch is read, until somebody wants all of it. */
  #isLazy: boolean;
  #isFixed: boolean;
  readonly #fanout: HostFanout | null;
  #filling: CaptureSession | FetchSession | null = null;
  #opening: Promise<FetchSession> | null = null;
  #isOver = false;
  /** The capture of an earlier daemon is being taken up. */
  #isResuming = false;
  /** Set while the filling is to begin soon. */
  #fillTimer: NodeJS.Timeout | null = null;
  #copies: PrivateCopies | null = null;

  constructor(context: ForkContext, record: ForkRecord, parent: ManagedVm | null) {
    const { request, image, state, transport } = record;
    this.#context = context;
    this.#image = image;
    this.#parent = parent;
    this.#wasCommitted = state === 'committed';
    this.#fanout = request.fanout ?? null;
    this.isPrivate = request.memory === 'private';
    this.#origin = request.origin === undefined ? null : new OriginHost(context, request.origin, transport);
    this.#isLazy = isLazy(record) && record.isCompleting !== true;
    this.isFilled = this.isJoined || (request.image === null && request.parentMode === 'continue');
    this.#isFixed = request.image !== null || this.#wasCommitted;
  }

  /** Another host has the image. */
  get isJoined(): boolean {
    return this.#origin !== null;
  }

  get filling(): CaptureSession | FetchSession | null {
    return this.#filling;
  }

  get capture(): CaptureSession | null {
    return this.#filling instanceof CaptureSession ? this.#filling : null;
  }

  /** Every page is in the image. */
  get isComplete(): boolean {
    return !this.isFilled || this.#isImageComplete || this.#filling?.isComplete === true;
  }

  /** The error that stopped the filling of the image, or null. */
  get failure(): MigrationError | null {
    return this.#filling?.failure ?? null;
  }

  /** Write-protects the parent. */
  async arm(clones: readonly ManagedVm[]): Promise<void> {
    if (this.isFilled && !this.isJoined) await (await this.#openCapture(clones, false)).arm();
  }

  /** Takes up the filling of an earlier daemon, unless it is complete. `onOpen` is called before it goes on. */
  async resume(clones: readonly ManagedVm[], onOpen: (filling: CaptureSession | FetchSession) => void): Promise<void> {
    if (!this.isFilled || this.#isImageComplete) return;
    if (this.isJoined) {
      const fetch = await this.#openFetch(clones, true);
      onOpen(fetch);
      // If every page is here, no holder is needed. Otherwise the session asks for one.
      const { deviceStateBytes } = this.#context.images.get(this.#image);
      if (this.#wasCommitted && !this.#isLazy) await fetch.sweep();
      // Before the state is here nothing needs a page, and the fork point may still be to come.
      else if (deviceStateBytes > 0) fetch.serve();
      return;
    }
    this.#isResuming = true;
    try {
      const capture = await this.#openCapture(clones, true);
      onOpen(capture);
      await capture.resume();
    } finally {
      this.#isResuming = false;
    }
  }

  /** Asks the host that has the image for it, and reads it from now on. */
  async connect(transport: Transport, clones: readonly ManagedVm[]): Promise<void> {
    const origin = this.#origin;
    if (origin === null) {
      throw new MigrationError('CONFLICT', `image ${this.#image} does not come from another host`);
    }
    if (this.#isImageComplete) return;
    if (this.#isLazy) await refuseRegistering(this.#context, transport);
    origin.transport = transport;
    const fetch = await this.#openFetch(clones, false);
    await fetch.connect(await origin.serveImage());
  }

  /**
   * Where the pages are that other hosts read. Throws CONFLICT if the image's files lack pages and nothing here can
   * bring them.
   */
  get served(): ImagePages {
    const { capture, failure } = this;
    const isFixed = this.#isFixed;
    if (failure !== null) throw failedImage(this.#image, this.#context.host, failure);
    if (!this.isFilled || this.#isImageComplete || capture?.snapshot.state === 'complete') {
      return { filling: null, isFixed };
    }
    // The map of its data would be read before the capture knows it, and never again.
    if (capture !== null && !this.#isResuming) return { filling: capture.handle, isFixed };
    throw new MigrationError('CONFLICT', `image ${this.#image} is not complete, and is not captured here`);
  }

  /** The same for hosts that get elsewhere what is not here. */
  get held(): ImagePages {
    const filling = this.#filling;
    const handle = filling instanceof FetchSession && !this.#isImageComplete ? filling.handle : null;
    return handle === null ? this.served : { filling: handle, isFixed: true };
  }

  /** The fork point has been taken: other hosts may read the image. */
  async fix(): Promise<void> {
    this.#isFixed = true;
    await this.#context.servers.fix(this.#image);
  }

  /** The clones are about to load the state, and touch pages. Throws CONFLICT if this host lacks what they need. */
  async beginServing(): Promise<void> {
    if (!this.isJoined || this.#isImageComplete) return;
    const { deviceStateBytes } = this.#context.images.get(this.#image);
    if (!(this.#filling instanceof FetchSession) || deviceStateBytes === 0) {
      throw new MigrationError('CONFLICT', `image ${this.#image} has no holder or no device state yet`);
    }
    // Private clones load when the image is complete.
    if (this.isPrivate) await this.#filling.sweep();
    else this.#filling.serve();
  }

  /** Resolves when every page is in the image. Rejects if it cannot be filled. */
  async captured(): Promise<void> {
    const outcome = await this.#filling?.filled;
    if (this.failure !== null) throw this.failure;
    if (outcome === 'failed') throw new MigrationError('CONFLICT', `image ${this.#image} was given up`);
  }

  /**
   * Serves the faults of private clones. Waits for the complete image first: pages that have not been copied yet would
   * be zeros in its files.
   */
  async openCopies(clones: readonly ManagedVm[], isResume: boolean): Promise<void> {
    if (!this.isPrivate) return;
    await this.captured();
    this.#copies ??= new PrivateCopies(this.#context, this.#context.images.get(this.#image));
    await this.#copies.open(clones, isResume);
    if (isResume) this.#copies.fill();
  }

  /**
   * Fills the image when the clones of all hosts run: only then the coordinator asks for progress. What a host reads
   * earlier takes processor and network from hosts whose clones do not run yet. Without the question it begins soon.
   */
  fillSoon(): void {
    this.#fillTimer ??= setTimeout(() => this.#fillNow(), FILL_MS_MAX).unref();
  }

  #fillNow(): void {
    if (this.#fillTimer === null) return;
    clearTimeout(this.#fillTimer);
    this.#fillTimer = null;
    if (this.#isOver) return;
    this.fill().catch((error: unknown) => {
      this.#context.log.error({ image: this.#image, err: toMigrationError(error) }, 'the image cannot be filled');
    });
  }

  /** Starts to bring the pages that nobody has asked for. To be called when the clones run. Idempotent. */
  async fill(): Promise<void> {
    // A host that reads may have no holder just now: it sweeps as soon as it has one.
    const isAble = this.isJoined || this.failure === null;
    if (isAble && !this.#isLazy) await this.#filling?.sweep();
    this.#copies?.fill();
  }

  /** Brings all pages, also if the fork wants only those that its clones touch. Idempotent. */
  async fillAll(): Promise<void> {
    this.#isLazy = false;
    await this.fill();
  }

  /** Forgets a clone that is to end, or has ended. Its memory is still open. */
  async drop(vm: ManagedVm): Promise<void> {
    if (!this.isPrivate) this.#filling?.removeClone(vm);
    await this.#copies?.drop(vm);
  }

  /** The same for a clone that has ended by itself. */
  forget(vm: ManagedVm): void {
    this.drop(vm).catch((error: unknown) => {
      this.#context.log.error(
        { vm: vm.spec.name, err: toMigrationError(error) },
        'the page session of a clone that has ended cannot be closed',
      );
    });
  }

  progress(record: ForkRecord): ForkProgress {
    this.#fillNow();
    const { images, host } = this.#context;
    if (!images.has(this.#image)) {
      throw new MigrationError('NOT_FOUND', `image ${this.#image} is no longer on ${host}`);
    }
    const failure = record.failure ?? this.failure?.toJSON() ?? null;
    const [image, filling, copies] = [images.get(this.#image), this.#filling, this.#copies];
    return progressOf({ record, image, isFilled: this.isFilled, filling, copies, failure });
  }

  /** Ends what is complete. */
  async finish(): Promise<void> {
    // What serves the capture ends before it: here and below. The readers ask again, and get the image's files.
    if (this.capture !== null) await this.#context.servers.endFilling(this.#image);
    await this.#filling?.finish();
    await this.#copies?.finish();
    this.#endReading();
  }

  /** Gives up the capture, which releases the parent. */
  async abandon(): Promise<void> {
    this.#isOver = true;
    const { images, servers } = this.#context;
    if (images.has(this.#image) && images.get(this.#image).state !== 'complete') await servers.close(this.#image);
    await this.#filling?.abandon();
    this.#endReading();
  }

  /** The image can never be complete. Its readers learn that when they ask again. */
  async giveUp(): Promise<void> {
    await this.#context.servers.close(this.#image);
    this.#endReading();
  }

  /** Leaves everything in place for the next daemon. */
  async leave(): Promise<void> {
    this.#isOver = true;
    await this.#copies?.close();
    await this.#context.servers.endFilling(this.#image);
    await this.#filling?.leave();
  }

  /** Nobody waits for the answer of the host that has the image. It may be gone. */
  #endReading(): void {
    void this.#origin?.end();
  }

  get #isImageComplete(): boolean {
    return this.#context.images.get(this.#image).state === 'complete';
  }

  async #openCapture(clones: readonly ManagedVm[], isResume: boolean): Promise<CaptureSession> {
    if (this.#filling instanceof CaptureSession) return this.#filling;
    const image = this.#context.images.get(this.#image);
    const capture = await CaptureSession.open(this.#context, image, { parent: this.#parent, isResume });
    this.#begin(capture, clones);
    return capture;
  }

  #openFetch(clones: readonly ManagedVm[], isResume: boolean): Promise<FetchSession> {
    this.#opening ??= this.#openFetchOnce(clones, isResume).catch((error: unknown) => {
      this.#opening = null;
      throw error;
    });
    return this.#opening;
  }

  async #openFetchOnce(clones: readonly ManagedVm[], isResume: boolean): Promise<FetchSession> {
    const origin = this.#origin;
    if (origin === null) throw new MigrationError('INTERNAL', `image ${this.#image} has no origin`);
    const fetch = await FetchSession.open(this.#context, this.#context.images.get(this.#image), {
      ...{ isResume, origin, fanout: this.#fanout },
    });
    if (this.#isOver) {
      await fetch.abandon();
      throw new MigrationError('CONFLICT', `the fork of image ${this.#image} has ended`);
    }
    this.#begin(fetch, clones);
    void fetch.over.then((outcome) => (outcome === 'complete' ? this.#endReading() : undefined));
    return fetch;
  }

  #begin(filling: CaptureSession | FetchSession, clones: readonly ManagedVm[]): void {
    this.#filling = filling;
    if (!this.isPrivate) for (const vm of clones) filling.addClone(vm);
  }
}

interface ProgressParts {
  readonly record: ForkRecord;
  readonly image: ImageRecord;
  /** The pages come after the fork point. */
  readonly isFilled: boolean;
  readonly filling: CaptureSession | FetchSession | null;
  readonly copies: PrivateCopies | null;
  readonly failure: ErrorJson | null;
}

/** The clones of a host that joins need not have all of the image. */
function isLazy({ request }: ForkRecord): boolean {
  return request.origin !== undefined && request.fetch === 'demand';
}

/** Registering memory allocates all of it. Only a device that pages on demand leaves the pages that nobody touches. */
async function refuseRegistering({ rdma, host }: ForkContext, transport: Transport): Promise<void> {
  const { registersMemory, title } = transportRow(transport);
  if (!registersMemory) return;
  const { devices } = await rdma.inventory();
  if (devices.length > 0 && devices.every(({ isOnDemandPaging }) => isOnDemandPaging)) return;
  throw new MigrationError('UNSUPPORTED', `reading on demand by ${title} would allocate the whole image on ${host}`, {
    remedy: 'read the whole image, or use TCP; a device with on-demand paging can do both',
  });
}

/** Computes the progress of a fork from its record and from the sessions that bring its pages. */
function progressOf({ record, image, isFilled, filling, copies, failure }: ProgressParts): ForkProgress {
  const { sizeBytes, pageBytes } = image.spec.memory;
  const pagesTotal = sizeBytes / pageBytes;
  const isFilling = isFilled && image.state !== 'complete' && filling?.isComplete !== true;
  const isCopying = isFilling || (record.request.memory === 'private' && copies?.isComplete !== true);
  const { isWarm, clones, outcome } = record;
  const isCommitted = record.state === 'committed';
  const isLazily = isCommitted && isLazy(record);
  return {
    state: failure !== null ? 'failed' : isCopying || !isCommitted ? (isLazily ? 'lazy' : 'filling') : 'complete',
    error: failure ?? (isFilling && filling instanceof FetchSession ? (filling.trouble?.toJSON() ?? null) : null),
    pagesTotal: pagesTotal + (copies?.pagesTotal ?? 0),
    pagesDone: (isFilling ? (filling?.pagesDone ?? 0) : pagesTotal) + (copies?.pagesDone ?? 0),
    pageBytes,
    counters: filling?.counters ?? {},
    ...(filling instanceof FetchSession ? { nearBytes: filling.nearBytes } : {}),
    committed: outcome === null ? null : { image: image.id, isWarm, clones, ...outcome },
  };
}

/**
 * What brings the pages of a fork: the capture of a parent that continues to run, and the copies of private clones. A
 * fork whose pages are all there has neither.
 */
import { MigrationError } from '../../domain/errors.js';
import type { ForkProgress } from '../../engine/ports/fork.js';
import type { ManagedVm } from '../vm/vms.js';
import { CaptureSession } from './capture-session.js';
import type { ForkContext } from './context.js';
import { PrivateCopies } from './private-copies.js';
import { progressOf } from './progress.js';
import type { ForkRecord } from './record.js';

export class ForkPages {
  readonly #context: ForkContext;
  readonly #image: string;
  readonly #parent: ManagedVm | null;
  /** The clones have memory files of their own, which are filled from the complete image. */
  readonly isPrivate: boolean;
  /** The parent continues to run, so that its pages are copied. */
  readonly isCopied: boolean;
  #capture: CaptureSession | null = null;
  #copies: PrivateCopies | null = null;

  constructor(context: ForkContext, { request, image }: ForkRecord, parent: ManagedVm | null) {
    this.#context = context;
    this.#image = image;
    this.#parent = parent;
    this.isPrivate = request.memory === 'private';
    this.isCopied = request.image === null && request.parentMode === 'continue';
  }

  get capture(): CaptureSession | null {
    return this.#capture;
  }

  /** The error that stopped the capture, or null. */
  get failure(): MigrationError | null {
    return this.#capture?.failure ?? null;
  }

  /** Write-protects the parent. */
  async arm(clones: readonly ManagedVm[]): Promise<void> {
    if (this.isCopied) await (await this.#open(clones, false)).arm();
  }

  /** Takes up the capture of an earlier daemon, unless it is complete. `onOpen` is called before it goes on. */
  async resume(clones: readonly ManagedVm[], onOpen: (capture: CaptureSession) => void): Promise<void> {
    if (!this.isCopied || this.#context.images.get(this.#image).state === 'complete') return;
    const capture = await this.#open(clones, true);
    onOpen(capture);
    await capture.resume();
  }

  /** Resolves when the image is complete. Rejects if the capture fails. */
  async captured(): Promise<void> {
    await this.#capture?.over;
    if (this.failure !== null) throw this.failure;
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

  /** Starts to bring the pages that nobody has asked for. To be called when the clones run. Idempotent. */
  async fill(): Promise<void> {
    if (this.failure === null) await this.#capture?.sweep();
    this.#copies?.fill();
  }

  /** Forgets a clone that is to end, or has ended. Its memory is still open. */
  async drop(vm: ManagedVm): Promise<void> {
    if (!this.isPrivate) this.#capture?.removeClone(vm);
    await this.#copies?.drop(vm);
  }

  progress(record: ForkRecord): ForkProgress {
    const { images, host } = this.#context;
    if (!images.has(this.#image)) {
      throw new MigrationError('NOT_FOUND', `image ${this.#image} is no longer on ${host}`);
    }
    const failure = record.failure ?? this.failure?.toJSON() ?? null;
    const [image, capture, copies] = [images.get(this.#image), this.#capture, this.#copies];
    return progressOf({ record, image, isCopied: this.isCopied, capture, copies, failure });
  }

  /** Ends what is complete. */
  async finish(): Promise<void> {
    await this.#capture?.finish();
    await this.#copies?.finish();
  }

  /** Gives up the capture, which releases the parent. */
  async abandon(): Promise<void> {
    await this.#capture?.abandon();
  }

  /** Leaves everything in place for the next daemon. */
  async leave(): Promise<void> {
    await this.#copies?.close();
    await this.#capture?.leave();
  }

  async #open(clones: readonly ManagedVm[], isResume: boolean): Promise<CaptureSession> {
    if (this.#capture !== null) return this.#capture;
    const image = this.#context.images.get(this.#image);
    const capture = await CaptureSession.open(this.#context, image, { parent: this.#parent, isResume });
    this.#capture = capture;
    if (!this.isPrivate) for (const vm of clones) capture.addClone(vm);
    return capture;
  }
}

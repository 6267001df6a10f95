/** What becomes of a fork when its image is complete, or can never be. */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkBook } from './book.js';
import type { ForkContext } from './context.js';
import type { ForkClones } from './fork-clones.js';
import type { CaptureSession } from './pages/capture-session.js';
import { FetchSession } from './pages/fetch-session.js';
import type { ForkPages } from './pages.js';
import { giveUpImage, isPermanent, keepDamaged } from './unfillable.js';

export interface FillingParts {
  readonly book: ForkBook;
  readonly pages: ForkPages;
  readonly clones: ForkClones;
  readonly parent: ManagedVm | null;
  /** The records of what has happened since the commit. The image is complete only after them. */
  readonly settling: () => Promise<void>;
  /** The fork is over, or the daemon ends. */
  readonly isClosing: () => boolean;
}

export class ForkFilling {
  readonly #context: ForkContext;
  readonly #parts: FillingParts;
  #isFollowed = false;
  #over: Promise<void> = Promise.resolve();

  constructor(context: ForkContext, parts: FillingParts) {
    this.#context = context;
    this.#parts = parts;
  }

  /** Resolves when the end of the filling has been recorded, or at once if nothing is filled. */
  get over(): Promise<void> {
    return this.#over;
  }

  /** Takes up what an earlier daemon has begun. False: that is not possible, and the clones are ended. */
  async resume(): Promise<boolean> {
    const { pages, clones } = this.#parts;
    try {
      await pages.resume(clones.vms, (filling) => this.#follow(filling));
      return true;
    } catch (thrown) {
      const error = toMigrationError(thrown);
      if (!isPermanent(error)) throw error;
      await this.fail(error);
      return false;
    }
  }

  /** The clones run, or are about to. */
  follow(): void {
    const { filling } = this.#parts.pages;
    if (filling !== null) this.#follow(filling);
  }

  /** An image that cannot be filled ends its clones before they run. */
  async failIfDue(): Promise<void> {
    const { failure } = this.#parts.pages;
    if (failure !== null) await (this.#isFollowed ? this.#over : this.fail(failure));
  }

  /** Gives up the image, which can never be complete. */
  async fail(failure: MigrationError): Promise<void> {
    const { book, pages, clones, parent } = this.#parts;
    book.fail(failure.toJSON());
    const [vms, { filling }] = [clones.vms, pages];
    await pages.giveUp();
    const failed = { record: book.record, clones: vms, filling, parent };
    if (failure.code === 'DAMAGED') await keepDamaged(this.#context, failed, failure.message);
    else await giveUpImage(this.#context, failed);
  }

  /**
   * Records what has become of the image, if that has failed before. It is the last that needs the maps of its pages.
   * Throws CONFLICT if pages are missing: without the maps the clones would read zeros.
   */
  async record(): Promise<void> {
    const { book, pages, isClosing } = this.#parts;
    const { images } = this.#context;
    const { image } = book.record;
    if (isClosing()) throw new MigrationError('UNREACHABLE', 'the daemon is closing', { isRetryable: true });
    if (!images.has(image) || images.get(image).state !== 'filling') return;
    if (pages.isComplete) return images.update(image, { state: 'complete', ...this.#check });
    // The first attempt to give it up has failed.
    if (pages.failure !== null) return this.fail(pages.failure);
    throw new MigrationError('CONFLICT', `pages of image ${image} are missing`, { isRetryable: true });
  }

  #follow({ over }: Pick<CaptureSession, 'over'>): void {
    if (this.#isFollowed) return;
    this.#isFollowed = true;
    this.#over = over
      .then((outcome) => this.#isOver(outcome))
      .catch((error: unknown) => {
        const { fork } = this.#parts.book.record.request;
        this.#context.log.error({ fork, err: toMigrationError(error) }, 'the end of the filling cannot be recorded');
      });
  }

  async #isOver(outcome: 'complete' | 'failed'): Promise<void> {
    const { book, pages, settling, isClosing } = this.#parts;
    if (isClosing()) return;
    const settled = settling();
    const { failure } = pages;
    if (failure !== null) {
      await settled.catch(() => undefined);
      return this.fail(failure);
    }
    await settled;
    // Otherwise somebody has closed it, who knows what becomes of the image.
    if (outcome === 'complete') {
      await this.#context.images.update(book.record.image, { state: 'complete', ...this.#check });
    }
  }

  /** What has become of the check of an image that was read from another host. */
  get #check(): { readonly isChecked?: boolean } {
    const { filling } = this.#parts.pages;
    return filling instanceof FetchSession ? { isChecked: filling.isChecked } : {};
  }
}

/**
 * Copies one parent's memory into its image while parent and clones run. A session owns the native capture and the
 * files that the capture works on.
 */

import { link, unlink } from 'node:fs/promises';
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import { deferred } from '../../../kit/deferred.js';
import { failureToError } from '../../../native/failure.js';
import type { ImageCaptureHandle, ImageSnapshot, RegionFile, TouchOrder } from '../../../native/types.js';
import type { ImageContext } from '../../image/context.js';
import type { ImageRecord } from '../../image/record.js';
import type { ManagedVm } from '../../vm/vms.js';
import { TouchKeeper } from './touch-keeper.js';

export class CaptureSession {
  readonly handle: ImageCaptureHandle;
  readonly #context: ImageContext;
  readonly #image: ImageRecord;
  readonly #over = deferred<'complete' | 'failed'>();
  /** Files that `finish` removes, when no process reads them any more. */
  readonly #files: readonly string[];
  readonly #touch: TouchKeeper;
  #last: ImageSnapshot | null = null;
  #isOpen = true;

  private constructor(context: ImageContext, image: ImageRecord, parts: CaptureParts) {
    this.#context = context;
    this.#image = image;
    this.#files = [...parts.links, ...parts.image.map(({ presencePath }) => presencePath)];
    this.handle = openCapture(context, { ...parts, onEdge: () => this.#checkState() });
    const { before } = parts;
    this.#touch = new TouchKeeper(context.images, image, { before, read: () => this.handle.touched() });
    context.images.setFilling(image.id, this);
  }

  /** `parent` is null if the parent has ended. Its memory files then still exist under the image's own names. */
  static async open(
    context: ImageContext,
    image: ImageRecord,
    options: { parent: ManagedVm | null; isResume: boolean },
  ): Promise<CaptureSession> {
    const { images } = context;
    const { parent, isResume } = options;
    const before = await images.orders.read(image);
    const files = await images.withPresence(image);
    // The parent is a clone. If its process dies its own pages are lost, so hard links to the files would not help.
    if (parent !== null && parent.image !== null) {
      const parts = { parent, source: parent.regions, image: files, isResume, links: [], before };
      return new CaptureSession(context, image, parts);
    }
    const source: RegionFile[] = files.map(({ path, lengthBytes, pageBytes }) => ({
      path: sourcePath(path),
      lengthBytes,
      pageBytes,
    }));
    if (!isResume) {
      if (parent === null) throw new MigrationError('INTERNAL', `the capture of image ${image.id} has no parent`);
      // The image gets hard links of its own, because the parent's files are removed if it ends before the copy is
      // done.
      for (const [index, { path }] of parent.regions.entries()) await linkIfMissing(path, source[index]?.path ?? '');
    }
    const links = source.map(({ path }) => path);
    return new CaptureSession(context, image, { parent, source, image: files, isResume, links, before });
  }

  /** Resolves when every page has been copied, or when the capture has failed. */
  get over(): Promise<'complete' | 'failed'> {
    this.#checkState();
    return this.#over.promise;
  }

  /** The same: its pages are this host's own. */
  get filled(): Promise<'complete' | 'failed'> {
    return this.over;
  }

  get snapshot(): ImageSnapshot {
    if (this.#isOpen || this.#last === null) this.#last = this.handle.snapshot();
    return this.#last;
  }

  /** The error that stopped the capture, or null. */
  get failure(): MigrationError | null {
    const { state, failure } = this.snapshot;
    if (state !== 'failed') return null;
    if (failure !== null) return failureToError(failure, 'filling the image');
    return new MigrationError('NATIVE_FAILED', 'the image of the clones cannot be filled');
  }

  /** Nothing more is to be done for the pages. */
  get isComplete(): boolean {
    return this.snapshot.state === 'complete';
  }

  get counters(): Readonly<Record<string, number>> {
    return Object.fromEntries(Object.entries(this.snapshot.counters).map(([name, value]) => [name, Number(value)]));
  }

  /** The parent is on this host. */
  get trouble(): null {
    return null;
  }

  get touched(): TouchOrder {
    return this.#touch.order;
  }

  get pagesDone(): number {
    const { pagesCopied, pagesZero } = this.snapshot.counters;
    return Number(pagesCopied) + Number(pagesZero);
  }

  arm(): Promise<void> {
    return this.handle.arm();
  }

  resume(): Promise<void> {
    return this.handle.resume();
  }

  /** Starts copying the pages that neither the parent nor a clone has asked for. */
  sweep(): Promise<void> {
    return this.handle.sweep();
  }

  /** Does nothing for a clone that has ended. */
  addClone({ memory }: ManagedVm): void {
    if (memory !== null) this.handle.addClone(memory);
  }

  removeClone({ memory }: ManagedVm): void {
    if (memory !== null && this.#isOpen) this.handle.removeClone(memory);
  }

  /** Closes a complete or failed capture and removes its files. Only the image is left. */
  async finish(): Promise<void> {
    await this.#end({ isLost: false });
    for (const path of this.#files) await unlink(path).catch(ignoreMissing);
  }

  /** Closes a capture that is given up, which releases the parent. The caller removes the files. */
  async abandon(): Promise<void> {
    await this.#end({ isLost: true });
  }

  /** Closes the session and leaves everything in place for the next daemon. */
  async leave(): Promise<void> {
    if (!this.#isOpen) return;
    this.#last = this.handle.snapshot();
    this.#isOpen = false;
    await this.#touch.close({ isLost: false });
    await this.handle.leave();
  }

  async #end(fate: { readonly isLost: boolean }): Promise<void> {
    this.#context.images.setFilling(this.#image.id, null);
    if (!this.#isOpen) return;
    this.#last = this.handle.snapshot();
    this.#isOpen = false;
    await this.#touch.close(fate);
    await this.handle.close();
  }

  #checkState(): void {
    // onEdge may be called before the constructor has stored the handle, and after the handle has been closed.
    if (!this.#isOpen || this.handle === undefined) return;
    const { state } = this.handle.snapshot();
    if (state === 'complete' || state === 'failed') this.#over.resolve(state);
  }
}

interface CaptureParts {
  readonly parent: ManagedVm | null;
  readonly source: readonly RegionFile[];
  /** Hard links to the source's files. */
  readonly links: readonly string[];
  readonly image: readonly (RegionFile & { readonly presencePath: string })[];
  readonly isResume: boolean;
  /** What an earlier daemon has seen clones touch. */
  readonly before: TouchOrder;
}

function openCapture(
  { native }: ImageContext,
  { parent, source, image, isResume, onEdge }: Omit<CaptureParts, 'links' | 'before'> & { readonly onEdge: () => void },
): ImageCaptureHandle {
  try {
    return native.openImageCapture({ parent: parent?.memory ?? null, source, image, isResume, onEdge });
  } catch (thrown) {
    const cause = toMigrationError(thrown);
    if (!isResume || cause.code !== 'QEMU_GONE') throw cause;
    // The parent is a clone. Pages that it had written existed only in its process, so a retry cannot succeed.
    throw new MigrationError(
      'REGION_CHANGED',
      'pages of the image are lost, because the process of its parent has ended',
      {
        cause,
      },
    );
  }
}

function sourcePath(imagePath: string): string {
  return `${imagePath}.parent`;
}

/** If the link exists, an earlier attempt has made it, and it names the same file. */
async function linkIfMissing(path: string, other: string): Promise<void> {
  await link(path, other).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'EEXIST') throw error;
  });
}

function ignoreMissing(error: NodeJS.ErrnoException): void {
  if (error.code !== 'ENOENT') throw error;
}

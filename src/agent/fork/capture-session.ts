/**
 * The copying of one parent's memory into its image, while parent and clones run: the native capture with the files it
 * works on.
 */

import { link, unlink } from 'node:fs/promises';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { deferred } from '../../kit/deferred.js';
import type { ImageCaptureHandle, ImageSnapshot, RegionFile } from '../../native/types.js';
import type { ImageRecord } from '../image/record.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';

export class CaptureSession {
  readonly handle: ImageCaptureHandle;
  readonly #context: ForkContext;
  readonly #image: ImageRecord;
  readonly #over = deferred<'complete' | 'failed'>();
  /** Removed once nobody reads them. */
  readonly #files: readonly string[];
  #last: ImageSnapshot | null = null;
  #isOpen = true;

  private constructor(context: ForkContext, image: ImageRecord, parts: CaptureParts) {
    this.#context = context;
    this.#image = image;
    this.#files = [...parts.links, ...parts.image.map(({ presencePath }) => presencePath)];
    this.handle = openCapture(context, { ...parts, onEdge: () => this.#look() });
    context.images.setFilling(image.id, () => this.pagesDone);
  }

  /** `parent` null: it has ended, its memory files are still there under the image's own names. */
  static async open(
    context: ForkContext,
    image: ImageRecord,
    options: { parent: ManagedVm | null; isResume: boolean },
  ): Promise<CaptureSession> {
    const { images } = context;
    const { parent, isResume } = options;
    const files = await images.withPresence(image);
    // If the process of a clone dies its own pages are lost, so hard links to the files would not help.
    if (parent !== null && parent.image !== null) {
      return new CaptureSession(context, image, { parent, source: parent.regions, image: files, isResume, links: [] });
    }
    const source: RegionFile[] = files.map(({ path, lengthBytes, pageBytes }) => ({
      path: sourcePath(path),
      lengthBytes,
      pageBytes,
    }));
    if (!isResume) {
      if (parent === null) throw new MigrationError('INTERNAL', 'a capture begins with a parent');
      // Names of the image's own: the parent may end, and take its files along, before all of them has been copied.
      for (const [index, { path }] of parent.regions.entries()) await nameAlso(path, source[index]?.path ?? '');
    }
    const links = source.map(({ path }) => path);
    return new CaptureSession(context, image, { parent, source, image: files, isResume, links });
  }

  /** When every page has been copied, or none will be any more. */
  get over(): Promise<'complete' | 'failed'> {
    this.#look();
    return this.#over.promise;
  }

  get snapshot(): ImageSnapshot {
    if (this.#isOpen || this.#last === null) this.#last = this.handle.snapshot();
    return this.#last;
  }

  get counters(): Readonly<Record<string, number>> {
    return Object.fromEntries(Object.entries(this.snapshot.counters).map(([name, value]) => [name, Number(value)]));
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

  /** Also what neither parent nor clones have asked for. */
  sweep(): Promise<void> {
    return this.handle.sweep();
  }

  /** Nothing to do for a clone that has ended. */
  addClone({ memory }: ManagedVm): void {
    if (memory !== null) this.handle.addClone(memory);
  }

  removeClone({ memory }: ManagedVm): void {
    if (memory !== null && this.#isOpen) this.handle.removeClone(memory);
  }

  /** Complete or failed: nothing of it is left but the image. */
  async finish(): Promise<void> {
    await this.#end();
    for (const path of this.#files) await unlink(path).catch(ignoreMissing);
  }

  /** Given up: the parent is let go, and the caller removes the files. */
  async abandon(): Promise<void> {
    await this.#end();
  }

  /** For the next daemon. */
  async leave(): Promise<void> {
    if (!this.#isOpen) return;
    this.#last = this.handle.snapshot();
    this.#isOpen = false;
    await this.handle.leave();
  }

  async #end(): Promise<void> {
    this.#context.images.setFilling(this.#image.id, null);
    if (!this.#isOpen) return;
    this.#last = this.handle.snapshot();
    this.#isOpen = false;
    await this.handle.close();
  }

  #look(): void {
    // An edge may come while the handle is being made, and after it has been closed.
    if (!this.#isOpen || this.handle === undefined) return;
    const { state } = this.handle.snapshot();
    if (state === 'complete' || state === 'failed') this.#over.resolve(state);
  }
}

interface CaptureParts {
  readonly parent: ManagedVm | null;
  readonly source: readonly RegionFile[];
  /** Further names of the source's files. */
  readonly links: readonly string[];
  readonly image: readonly (RegionFile & { readonly presencePath: string })[];
  readonly isResume: boolean;
}

function openCapture(
  { native }: ForkContext,
  { parent, source, image, isResume, onEdge }: Omit<CaptureParts, 'links'> & { readonly onEdge: () => void },
): ImageCaptureHandle {
  try {
    return native.openImageCapture({ parent: parent?.memory ?? null, source, image, isResume, onEdge });
  } catch (thrown) {
    const cause = toMigrationError(thrown);
    if (!isResume || cause.code !== 'QEMU_GONE') throw cause;
    // The parent is a clone: the pages that it has written were in its process alone, and no retry brings them back.
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

/** One of an attempt before is the same file. */
async function nameAlso(path: string, other: string): Promise<void> {
  await link(path, other).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'EEXIST') throw error;
  });
}

function ignoreMissing(error: NodeJS.ErrnoException): void {
  if (error.code !== 'ENOENT') throw error;
}

/**
 * Tells the hosts that read an image what the digests of its pages are. The host that has taken or loaded the image
 * computes them from its files, when they are first asked for. A host that has read the image itself only passes on
 * what it was told: digests of its own would approve what it may have received wrongly.
 */
import { MigrationError } from '../../../domain/errors.js';
import { KeyedLocks } from '../../../kit/locks.js';
import type { ImageDigestsHandle } from '../../../native/types.js';
import { CONSTANTS } from '../../../protocol/wire.js';
import type { ImageContext } from '../../image/context.js';
import type { ImageRecord } from '../../image/record.js';
import { failedImage } from './failed-image.js';

/** How much memory the digests of one answer are of. */
const PIECE_BYTES = 64 << 20;

const NONE = Buffer.alloc(0);

/** At least one page. */
export function pagesInPiece(pageBytes: number): number {
  return Math.max(1, PIECE_BYTES / pageBytes);
}

/** Returns the digests of the first so many pages of a piece, or null if it has not so many. */
export function pieceOf(piece: Buffer, pageCount: number): Buffer | null {
  const lengthBytes = pageCount * CONSTANTS.DIGEST_BYTES;
  return piece.length < lengthBytes ? null : piece.subarray(0, lengthBytes);
}

export class DigestServer {
  readonly #context: ImageContext;
  readonly #handles = new Map<string, ImageDigestsHandle>();
  /** One at a time computes the digests of an image. The others find them. */
  readonly #locks = new KeyedLocks();

  constructor(context: ImageContext) {
    this.#context = context;
  }

  /**
   * Returns digests of pages of the region from `firstPage` on: none if they are not known yet, null if they never will
   * be.
   */
  async digests(image: string, regionIndex: number, firstPage: number): Promise<Buffer | null> {
    const region = this.#context.images.get(image).spec.memory.regions[regionIndex];
    const { pageBytes } = this.#context.images.get(image).spec.memory;
    if (region === undefined || firstPage >= region.lengthBytes / pageBytes) {
      throw new MigrationError('USAGE', `image ${image} has no page ${firstPage} in region ${regionIndex}`);
    }
    return this.#locks.hold(image, async () => {
      const record = this.#context.images.get(image);
      if (record.state === 'failed') throw failedImage(image, this.#context.host);
      const isOwn = record.isChecked === undefined;
      // Its files are not held open either, while it may still be given up.
      if (isOwn && record.state !== 'complete') return NONE;
      const handle = await this.#handle(record);
      const pagesMax = pagesInPiece(pageBytes);
      // Only one piece for each question: whoever asks from far behind waits, not all others.
      const known = handle.known(regionIndex);
      if (isOwn && known <= firstPage) {
        await handle.make(regionIndex, Math.min(pagesMax, region.lengthBytes / pageBytes - known));
      }
      const count = Math.min(pagesMax, handle.known(regionIndex) - firstPage);
      if (count > 0) return handle.read(regionIndex, firstPage, count);
      return isOwn || record.state !== 'complete' ? NONE : null;
    });
  }

  /** The image is about to be removed, or nobody reads it any more. A computation under way is given up. */
  close(image: string): Promise<void> {
    this.#handles.get(image)?.close();
    return this.#locks.hold(image, async () => {
      this.#handles.get(image)?.close();
      this.#handles.delete(image);
    });
  }

  async closeAll(): Promise<void> {
    await Promise.all([...this.#handles.keys()].map((image) => this.close(image)));
  }

  async #handle(record: ImageRecord): Promise<ImageDigestsHandle> {
    const known = this.#handles.get(record.id);
    if (known !== undefined) return known;
    const image = await this.#context.images.withDigests(record);
    const handle = this.#context.native.openImageDigests({ image });
    this.#handles.set(record.id, handle);
    return handle;
  }
}

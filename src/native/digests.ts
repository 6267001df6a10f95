/** The handle of the digests of an image, which wraps that of the addon. */
import { MigrationError } from '../domain/errors.js';
import { attempt, attemptAsync } from './attempt.js';
import { checkPages } from './check.js';
import type { ImageDigestsHandle } from './types.js';

export interface AddonImageDigests {
  known(regionIndex: number): number;
  make(regionIndex: number, pageCount: number): Promise<void>;
  read(regionIndex: number, firstPage: number, pageCount: number): Buffer;
  accept(regionIndex: number, firstPage: number, digests: Uint8Array): void;
  close(): void;
}

export class ImageDigests implements ImageDigestsHandle {
  readonly #native: AddonImageDigests;

  constructor(native: AddonImageDigests) {
    this.#native = native;
  }

  static nativeOf(handle: ImageDigestsHandle): AddonImageDigests {
    if (handle instanceof ImageDigests) return handle.#native;
    throw new MigrationError('USAGE', 'native argument: digests is not a handle of this binding');
  }

  known(regionIndex: number): number {
    checkPages(regionIndex);
    return attempt('digests of an image', () => this.#native.known(regionIndex));
  }

  async make(regionIndex: number, pageCount: number): Promise<void> {
    checkPages(regionIndex, pageCount);
    await attemptAsync('make the digests of an image', () => this.#native.make(regionIndex, pageCount));
  }

  read(regionIndex: number, firstPage: number, pageCount: number): Buffer {
    checkPages(regionIndex, firstPage, pageCount);
    return attempt('read digests of an image', () => this.#native.read(regionIndex, firstPage, pageCount));
  }

  accept(regionIndex: number, firstPage: number, digests: Uint8Array): void {
    checkPages(regionIndex, firstPage);
    if (!(digests instanceof Uint8Array)) throw new MigrationError('USAGE', 'native argument: digests must be bytes');
    attempt('accept digests of an image', () => this.#native.accept(regionIndex, firstPage, digests));
  }

  close(): void {
    this.#native.close();
  }
}

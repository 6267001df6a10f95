/**
 * The names of the overlays that parents continue in: the name of the disk's first file and the id of the image. All
 * overlays of a disk stand beside it, and no name grows with the number of forks.
 */

const SUFFIX = /\.[0-9a-f]{16}$/;

/** The longest chain of files below a disk. QEMU opens all of them, and each read may pass through all. */
export const CHAIN_FILES_MAX = 16;

export function overlayPath(path: string, image: string): string {
  return `${path.replace(SUFFIX, '')}.${image}`;
}

/** True if `path` is an overlay that a fork has made on `base`. */
export function isOverlayOf(path: string, base: string | null): boolean {
  if (base === null || !SUFFIX.test(path)) return false;
  // Build 0.1.0 appended each id to the name before.
  return path.replace(SUFFIX, '') === base.replace(SUFFIX, '') || path.replace(SUFFIX, '') === base;
}

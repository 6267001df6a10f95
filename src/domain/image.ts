/**
 * capturing: not committed yet; a restarted daemon removes it. filling: committed, pages are still being copied, and
 * clones may run. complete: all pages are in the image, so the parent is no longer needed. failed: not usable.
 */
export const IMAGE_STATES = ['capturing', 'filling', 'complete', 'failed'] as const;
export type ImageState = (typeof IMAGE_STATES)[number];

export interface ImageView {
  readonly id: string;
  readonly host: string;
  readonly state: ImageState;
  /** Name of the VM of which the image was taken. */
  readonly parent: string;
  readonly createdAt: string;
  readonly memoryBytes: number;
  /** Allocated bytes of the memory files: the memory that the image takes now. */
  readonly allocatedBytes: number;
  readonly pageBytes: number;
  readonly deviceStateBytes: number;
  readonly pagesTotal: number;
  readonly pagesDone: number;
  /** Base images of its disks; they stay read-only. */
  readonly disks: readonly string[];
  /** VMs that run on the image. The image cannot be removed before them. */
  readonly clones: readonly string[];
}

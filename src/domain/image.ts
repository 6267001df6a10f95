/**
 * filling: captured, pages still being copied; clones may run. complete: nobody but clones needs anything any more.
 * failed: not usable.
 */
export const IMAGE_STATES = ['capturing', 'filling', 'complete', 'failed'] as const;
export type ImageState = (typeof IMAGE_STATES)[number];

export interface ImageView {
  readonly id: string;
  readonly host: string;
  readonly state: ImageState;
  /** Name of the VM it was taken of. */
  readonly parent: string;
  readonly createdAt: string;
  readonly memoryBytes: number;
  /** Of memory files; what the image costs now. */
  readonly allocatedBytes: number;
  readonly pageBytes: number;
  readonly deviceStateBytes: number;
  readonly pagesTotal: number;
  readonly pagesDone: number;
  /** Base images of its disks, read-only for ever. */
  readonly disks: readonly string[];
  /** VMs that run on it; it cannot be removed before them. */
  readonly clones: readonly string[];
}

/**
 * capturing: not committed yet; a restarted daemon removes it. filling: committed, pages are still being copied, and
 * clones may run. complete: all pages are in the image, so the parent is no longer needed. failed: not usable.
 * unloaded: its memory is gone from this host, and its disk layers are kept for saved files or other hosts.
 */
export const IMAGE_STATES = ['capturing', 'filling', 'complete', 'failed', 'unloaded'] as const;
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
  /** How many clusters of its memory (64 KiB) clones have touched in an order that is known. */
  readonly touchedClusters?: number;
  readonly pagesTotal: number;
  readonly pagesDone: number;
  /** Base images of its disks; they stay read-only. */
  readonly disks: readonly string[];
  /** VMs that run on the image. The image cannot be removed before them. */
  readonly clones: readonly string[];
  /** Files that the image was saved to without its disks, which need the disks as they are. Absent: none. */
  readonly savedFiles?: readonly string[];
  /** Why its pages do not come at present or never will, or which one is damaged. Absent: they do, or are all here. */
  readonly problem?: string;
  /** Other hosts that read the image. Until they have ended, it is removed only by force. Absent: none. */
  readonly readers?: readonly string[];
  /** Only of an image that was read from another host: every page is what that host's digests say. */
  readonly isChecked?: boolean;
  /** The disks (ids) that another host serves. Absent: this host has the files of all disks. */
  readonly served?: { readonly host: string; readonly disks: readonly string[] };
}

/** A disk file that `image rm` has kept, and who needs it. */
export interface KeptLayer {
  readonly path: string;
  readonly reason: string;
}

/** What the removal of an image has done, or would do. */
export interface ImageRemoval {
  readonly id: string;
  /** Memory that the image took. */
  readonly freedBytes: number;
  /** Overlays of parents that were merged into their backing files. */
  readonly mergedDisks: readonly string[];
  /** Layers that stay. If there are any of this image's own, it stays listed as `unloaded`. */
  readonly keptLayers: readonly KeptLayer[];
}

export interface PruneReport {
  readonly removed: readonly ImageRemoval[];
  /** Images that stay, each with the reason. */
  readonly kept: readonly { readonly id: string; readonly reason: string }[];
  readonly freedBytes: number;
}

/** What merging the overlays of one VM has done. */
export interface FlattenReport {
  readonly vm: string;
  readonly mergedDisks: readonly string[];
  readonly keptLayers: readonly KeptLayer[];
}

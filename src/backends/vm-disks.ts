/** What the agent asks of the back end about the disks of a VM that is up. */
import type { DiskSpec } from '../domain/vm.js';

/** A disk and the overlay that it is to continue in. The names are the back end's own. */
export interface OpenOverlay {
  readonly node: string;
  readonly overlay: string;
}

/** A disk of the VM, and a qcow2 whose backing file is the disk's earlier file. */
export interface DiskOverlay {
  /** The id of the disk. */
  readonly id: string;
  readonly path: string;
  readonly base: Pick<DiskSpec, 'path' | 'format'>;
}

export interface VmDisks {
  /**
   * Returns the files that the guest's disks use now, by the disk's id, or by the device of a disk that no spec has.
   */
  active(): Promise<ReadonlyMap<string, { readonly path: string; readonly isReadOnly: boolean }>>;
  /** True if the VM has this file open as a disk or as a disk's backing file. */
  isOpen(path: string): Promise<boolean>;
  /**
   * Opens overlays on the files that the disks use now. If an earlier attempt has left an overlay open, it is closed
   * first. Then `create` makes it. The guest does not notice. The overlays are named by `image` and their order, so
   * every attempt uses the same names. Throws CONFLICT if the guest has no such disk.
   */
  openOverlays(
    image: string,
    overlays: readonly DiskOverlay[],
    create: (overlay: DiskOverlay, index: number) => Promise<void>,
  ): Promise<readonly OpenOverlay[]>;
  /** Switches all disks to their overlays at one moment, or none. The VM must be stopped. */
  switchToOverlays(open: readonly OpenOverlay[]): Promise<void>;
  /**
   * Merges the overlay into its base and removes it from the disk's chain. Returns false if the VM has no such chain.
   * The VM may run. `atSwitch` is called if the disk itself uses the overlay, when both have the same content.
   */
  merge(overlay: DiskOverlay, atSwitch: AtSwitch): Promise<boolean>;
  /** Returns a description of each job that reads or writes the disks now, such as a merge or a backup. */
  jobs(): Promise<readonly string[]>;
  /**
   * Closes the file unless a disk uses it, also as a backing file. Returns false if one does. True: the file may be
   * removed.
   */
  release(path: string): Promise<boolean>;
  /** Cancels the merge in progress, also one of an earlier daemon. A disk that still uses its overlay keeps it. */
  abandonMerges(): Promise<void>;
}

/**
 * Switches a disk from its overlay to the base by calling `complete`. If it throws before, the disk stays on the
 * overlay. If `complete` throws, the disk may use either.
 */
export type AtSwitch = (complete: () => Promise<void>) => Promise<void>;

/**
 * The calls to a host on its images, and on the clones that run on them. Hosts have images with the same id: the one
 * that has made it, those that have joined its fork, and those that have loaded the same file. Each has clones of its
 * own.
 *
 * Hosts of earlier builds do not know these calls, and answer NOT_FOUND. So a question about an image that a host does
 * not have is answered with an empty list.
 */
import type { VmIdentity } from '../../domain/host.js';
import type { ImageRemoval, ImageView } from '../../domain/image.js';
import type { VmView } from '../../domain/vm.js';

export interface RemoveImageOptions {
  /** Removes the image although another host reads it, and merges layers that another host may need. */
  readonly isForced: boolean;
  /** Gives up the saved files that need the image's disks. */
  readonly isDroppingSaved: boolean;
}

export interface StoppedVms {
  readonly stopped: readonly string[];
  /** The VMs that could not be ended. The errors are JSON, like everything that may come from another host. */
  readonly failures: readonly { readonly name: string; readonly error: unknown }[];
}

export interface ImagesPort {
  /** The image with this id, or all images (null). */
  imageViews(image: string | null): Promise<{ readonly images: readonly ImageView[] }>;
  /** The VMs whose memory is the image, also those that have ended and are still listed. */
  imageClones(image: string): Promise<{ readonly clones: readonly VmView[] }>;
  /**
   * Ends those of the VMs that are here, and removes those that have ended. A VM of the same name with another UUID is
   * left alone. No power button is pressed.
   */
  stopClones(clones: readonly VmIdentity[], isForced: boolean): Promise<StoppedVms>;
  /** Throws CONFLICT while something on this host needs the image, or, unless forced, another host reads it. */
  removeImage(image: string, options: RemoveImageOptions): Promise<ImageRemoval>;
}

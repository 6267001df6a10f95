/**
 * The calls that users make on the images of this host: list, show, remove (which also merges the overlays), save and
 * load.
 */
import { MigrationError } from '../../domain/errors.js';
import type { ImageView } from '../../domain/image.js';
import type { DiskSpec } from '../../domain/vm.js';
import { KeyedLocks } from '../../kit/locks.js';
import { loadImage, saveImage } from '../image/file.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { mergeOverlays } from './overlay-merge.js';

export class Images {
  readonly #context: ForkContext;
  readonly #locks = new KeyedLocks();
  /** True if a waiting set or a fork in progress needs the image. */
  readonly #isClaimed: (image: string) => boolean;

  constructor(context: ForkContext, isClaimed: (image: string) => boolean) {
    this.#context = context;
    this.#isClaimed = isClaimed;
  }

  /** Leaves out the records of waiting sets, which are not images yet. */
  list(): ImageView[] {
    return this.#context.images.list().filter(({ state }) => state !== 'capturing');
  }

  /** Throws NOT_FOUND if this host has no such image. */
  find(id: string): ImageView {
    return this.#context.images.view(id);
  }

  /** Throws CONFLICT if a VM with these disks would write to a disk of an image, which its clones still read. */
  refuseWritesToImages(disks: readonly DiskSpec[]): void {
    for (const { path, isReadOnly } of disks) {
      const image = this.#context.images.all().find((record) => record.disks.some((disk) => disk.path === path));
      if (isReadOnly || image === undefined) continue;
      throw new MigrationError('CONFLICT', `${path} is a disk of image ${image.id}: no VM may write to it`, {
        remedy: `run "vmctl image rm ${image.id}", or set readOnly: true for the disk`,
      });
    }
  }

  /** Throws CONFLICT while the image has clones or a fork needs it. */
  remove(id: string): Promise<void> {
    const { images } = this.#context;
    return this.#locks.hold(id, async () => {
      const { state } = images.get(id);
      const clones = images.clonesOf(id);
      if (clones.length > 0) {
        const shown = `${clones.slice(0, 3).join(', ')}${clones.length > 3 ? ` and ${clones.length - 3} more` : ''}`;
        throw new MigrationError('CONFLICT', `image ${id} has clones: ${shown}`, {
          remedy: `vmctl stop --image ${id}`,
        });
      }
      if (state === 'capturing' || state === 'filling' || this.#isClaimed(id)) {
        throw new MigrationError('CONFLICT', `a fork needs image ${id}`, { remedy: 'wait until its job has ended' });
      }
      this.#refuseIfUnknown(id);
      await this.#refuseIfBackingFile(id);
      await mergeOverlays(this.#context, id);
      await images.delete(id);
    });
  }

  /** Throws CONFLICT while a VM runs whose record cannot be read: it may be a clone of the image. */
  #refuseIfUnknown(id: string): void {
    const unknown = this.#context.vms.unreadable().find(({ pid }) => pid !== null);
    if (unknown === undefined) return;
    throw new MigrationError('CONFLICT', `${unknown.name} runs, and may use image ${id}: its record cannot be read`, {
      remedy: 'stop vmigrated, then: vmctl state check DIR, and vmctl state repair DIR',
    });
  }

  /**
   * Throws CONFLICT if a clone has one of the image's disks as a backing file. Such a clone may have private memory, so
   * that it does not need the image any more, but removing the image would give the disk back to the parent for writes.
   */
  async #refuseIfBackingFile(id: string): Promise<void> {
    const { vms, images } = this.#context;
    const isUp = ({ state }: ManagedVm) => state === 'running' || state === 'paused';
    const clones = vms.all().filter((vm) => vm.spec.clone !== undefined && isUp(vm));
    for (const { base, vm: parent } of images.get(id).overlays) {
      for (const clone of clones) {
        if (clone.spec.name === parent || !(await clone.process.disks.isOpen(base.path))) continue;
        throw new MigrationError(
          'CONFLICT',
          `disk ${base.id} of ${clone.spec.name} uses a disk of image ${id} as its backing file`,
          { remedy: `vmctl stop ${clone.spec.name}` },
        );
      }
    }
  }

  /** Throws CONFLICT if the image is not complete, or if the file exists. */
  save(id: string, path: string): Promise<{ readonly fileBytes: number }> {
    return this.#locks.hold(id, () => saveImage(this.#context, id, path));
  }

  /** The image keeps the id that it was saved with. Throws CONFLICT if this host has that image already. */
  async load(path: string): Promise<ImageView> {
    return this.find(await loadImage(this.#context, path));
  }
}

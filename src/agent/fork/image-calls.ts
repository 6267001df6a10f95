/**
 * The images of this host as its users see them: listed, shown, removed with what they have left on disks, saved and
 * loaded.
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
  /** Does a waiting set or a fork under way need it? */
  readonly #isClaimed: (image: string) => boolean;

  constructor(context: ForkContext, isClaimed: (image: string) => boolean) {
    this.#context = context;
    this.#isClaimed = isClaimed;
  }

  /** Those of waiting sets are no images yet. */
  list(): ImageView[] {
    return this.#context.images.list().filter(({ state }) => state !== 'capturing');
  }

  /** NOT_FOUND if there is none. */
  find(id: string): ImageView {
    return this.#context.images.view(id);
  }

  /** CONFLICT if a VM with these disks would write to what clones have as theirs. */
  mustNotWrite(disks: readonly DiskSpec[]): void {
    for (const { path, isReadOnly } of disks) {
      const image = this.#context.images.all().find((record) => record.disks.some((disk) => disk.path === path));
      if (isReadOnly || image === undefined) continue;
      throw new MigrationError('CONFLICT', `${path} is a disk of image ${image.id}: nobody may write to it`, {
        remedy: `vmctl image rm ${image.id}, or a disk with readOnly: true`,
      });
    }
  }

  /** CONFLICT while a clone runs on it or a fork needs it. */
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
      await this.#mustNotBeLainOn(id);
      await mergeOverlays(this.#context, id);
      await images.delete(id);
    });
  }

  /**
   * CONFLICT if a clone with memory of its own, which needs the image no more, has its disk on one that the parent
   * would be given back.
   */
  async #mustNotBeLainOn(id: string): Promise<void> {
    const { vms, images } = this.#context;
    const isUp = ({ state }: ManagedVm) => state === 'running' || state === 'paused';
    const clones = vms.all().filter((vm) => vm.spec.clone !== undefined && isUp(vm));
    for (const { base, vm: parent } of images.get(id).overlays) {
      for (const clone of clones) {
        if (clone.spec.name === parent || !(await clone.process.disks.isOpen(base.path))) continue;
        throw new MigrationError('CONFLICT', `the disk ${base.id} of ${clone.spec.name} lies on one of image ${id}`, {
          remedy: `vmctl stop ${clone.spec.name}`,
        });
      }
    }
  }

  /** CONFLICT before the image is complete, or if there is such a file. */
  save(id: string, path: string): Promise<{ readonly fileBytes: number }> {
    return this.#locks.hold(id, () => saveImage(this.#context, id, path));
  }

  /** Under the id that it was saved with; CONFLICT if that image is here. */
  async load(path: string): Promise<ImageView> {
    return this.find(await loadImage(this.#context, path));
  }
}

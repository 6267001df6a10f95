/**
 * The calls that users make on the images of this host: list, show, remove (which also merges the overlays), save and
 * load.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { FlattenReport, ImageRemoval, ImageView, PruneReport } from '../../domain/image.js';
import type { VmSpec } from '../../domain/vm.js';
import { KeyedLocks } from '../../kit/locks.js';
import { imageIdIn, type LoadOptions, loadImage } from '../image/file-load.js';
import { saveImage } from '../image/file-save.js';
import { imagesElsewhere, layerPaths, NO_OTHER_HOSTS, type OtherHosts } from '../image/layer-holders.js';
import type { ImageRecord } from '../image/record.js';
import type { ForkContext } from './context.js';
import { flattenVm } from './flatten.js';
import { planRemoval, type RemoveOptions, refuseIfBackingFile, removeImage } from './image-removal.js';

/** The images of this host of which only those pages come that their clones touch. Nobody else needs them. */
export interface LazyImages {
  has(image: string): boolean;
  /** Ends the reading of the image, which `remove` removes. */
  without<T>(image: string, remove: () => Promise<T>): Promise<T>;
}

const NO_LAZY_IMAGES: LazyImages = { has: () => false, without: (_, remove) => remove() };

export class Images {
  readonly #context: ForkContext;
  readonly #others: OtherHosts;
  readonly #locks = new KeyedLocks();
  /** True if a waiting set or a fork in progress needs the image. */
  readonly #isClaimed: (image: string) => boolean;

  readonly #lazy: LazyImages;

  constructor(
    context: ForkContext,
    isClaimed: (image: string) => boolean,
    others: OtherHosts = NO_OTHER_HOSTS,
    lazy: LazyImages = NO_LAZY_IMAGES,
  ) {
    this.#context = context;
    this.#lazy = lazy;
    this.#isClaimed = isClaimed;
    this.#others = others;
  }

  /** Leaves out the records of waiting sets, which are not images yet. */
  list(): ImageView[] {
    return this.#context.images.list().filter(({ state }) => state !== 'capturing');
  }

  /** Throws NOT_FOUND if this host has no such image. */
  find(id: string): ImageView {
    return this.#context.images.view(id);
  }

  /**
   * Throws CONFLICT if a VM with these disks would write to a layer of an image, here or on another host that answers.
   * A host that does not answer is passed over: it must not keep VMs from being started.
   */
  async refuseWritesToImages({ disks, name }: Pick<VmSpec, 'disks' | 'name'>): Promise<void> {
    const { images, log } = this.#context;
    for (const { path } of disks.filter(({ isReadOnly }) => !isReadOnly)) {
      const image = images.all().find((record) => isLayer(record, path));
      if (image !== undefined) {
        throw new MigrationError('CONFLICT', `${path} is a disk of image ${image.id}: no VM may write to it`, {
          remedy: `run "vmctl image rm ${image.id}", or set readOnly: true for the disk`,
        });
      }
      const { holders, silent } = await imagesElsewhere(this.#others, path);
      if (silent.length > 0) log.warn({ vm: name, path, hosts: silent }, 'hosts cannot be asked for images of a disk');
      const [holder] = holders;
      if (holder === undefined) continue;
      throw new MigrationError('CONFLICT', `${path} is a disk of ${holder}: no VM may write to it`, {
        remedy: 'remove that image there, or set readOnly: true for the disk',
      });
    }
  }

  /** Throws CONFLICT while the image has clones or a fork needs it. */
  remove(id: string, options: RemoveOptions = { isForced: false, isDroppingSaved: false }): Promise<ImageRemoval> {
    return this.#locks.hold(id, async () => {
      const need = this.#needOf(id, options.isForced);
      if (need !== null) throw need;
      this.#refuseIfUnknown(id);
      await refuseIfBackingFile(this.#context, id);
      // Whoever overrules a reader has not seen yet who needs the layers. A second call overrules those.
      const isRead = (this.#context.images.get(id).readers ?? []).length > 0;
      return this.#remove(id, isRead ? { ...options, isForced: false } : options);
    });
  }

  #remove(id: string, options: RemoveOptions): Promise<ImageRemoval> {
    const { images, servers } = this.#context;
    const removeIt = async (): Promise<ImageRemoval> => {
      // A reader that is overruled is none any more, also if the record stays.
      const { readers, ...record } = images.get(id);
      if (readers !== undefined) await images.replace(id, record);
      return removeImage(this.#context, this.#others, id, options);
    };
    return servers.without(id, () => (this.#lazy.has(id) ? this.#lazy.without(id, removeIt) : removeIt()));
  }

  /** Throws CONFLICT while a VM runs whose record cannot be read: it may be a clone of the image. */
  #refuseIfUnknown(id: string): void {
    const unknown = this.#context.vms.unreadable().find(({ pid }) => pid !== null);
    if (unknown === undefined) return;
    throw new MigrationError('CONFLICT', `${unknown.name} runs, and may use image ${id}: its record cannot be read`, {
      remedy: 'stop vmigrated, then: vmctl state check DIR, and vmctl state repair DIR',
    });
  }

  /** Removes the images that nobody needs: no clone, no fork, no saved file. `isDryRun`: only says which. */
  async prune({ isDryRun }: { isDryRun: boolean }): Promise<PruneReport> {
    const options = { isForced: false, isDroppingSaved: false };
    const removed: ImageRemoval[] = [];
    const kept: { id: string; reason: string }[] = [];
    for (const { id } of this.list()) {
      const outcome = await this.#locks.hold(id, () => this.#prune(id, isDryRun, options));
      if (typeof outcome === 'string') kept.push({ id, reason: outcome });
      else if (outcome !== null) removed.push(outcome);
    }
    return { removed, kept, freedBytes: removed.reduce((sum, { freedBytes }) => sum + freedBytes, 0) };
  }

  /** Returns the removal, or the reason why the image stays. Null: it has gone meanwhile. */
  async #prune(id: string, isDryRun: boolean, options: RemoveOptions): Promise<ImageRemoval | string | null> {
    const { images } = this.#context;
    if (!images.has(id)) return null;
    const need = this.#needOf(id, options.isForced);
    if (need !== null) return need.message;
    try {
      this.#refuseIfUnknown(id);
      await refuseIfBackingFile(this.#context, id);
      const { kept } = await planRemoval(this.#context, this.#others, id, options);
      // The memory of an image whose layers are needed is somebody's choice to keep.
      if (kept.length > 0) return `${kept[0]?.path ?? ''} is ${kept[0]?.reason ?? ''}`;
      if (isDryRun) return { id, freedBytes: images.view(id).allocatedBytes, mergedDisks: [], keptLayers: [] };
      return await this.#remove(id, options);
    } catch (error) {
      return toMigrationError(error).message;
    }
  }

  /** `isForced`: whatever other hosts need. One that has died would keep the image for ever. */
  #needOf(id: string, isForced: boolean): MigrationError | null {
    const { images } = this.#context;
    const { state, readers = [] } = images.get(id);
    const clones = images.clonesOf(id);
    if (clones.length > 0) {
      const shown = `${clones.slice(0, 3).join(', ')}${clones.length > 3 ? ` and ${clones.length - 3} more` : ''}`;
      return new MigrationError('CONFLICT', `image ${id} has clones: ${shown}`, { remedy: `vmctl stop --image ${id}` });
    }
    const isFilled = state === 'capturing' || (state === 'filling' && !this.#lazy.has(id));
    if (isFilled || this.#isClaimed(id)) {
      return new MigrationError('CONFLICT', `a fork needs image ${id}`, { remedy: 'wait until its job has ended' });
    }
    if (readers.length === 0 || isForced) return null;
    const [who, reads] = readers.length === 1 ? ['host', 'reads'] : ['hosts', 'read'];
    return new MigrationError('CONFLICT', `${who} ${readers.join(', ')} still ${reads} image ${id}`, {
      remedy: 'wait until the image is complete there, or remove it there; --force removes it all the same',
    });
  }

  /** Merges the overlays that forks have left below a VM's disks, as far as nobody needs the layers. */
  flatten(vm: string): Promise<FlattenReport> {
    return this.#locks.hold(`vm ${vm}`, () => flattenVm(this.#context, this.#others, vm));
  }

  /** Throws CONFLICT if the image is not complete, or if the file exists. */
  save(id: string, path: string, options: { withDisks?: boolean } = {}): Promise<{ readonly fileBytes: number }> {
    return this.#locks.hold(id, () => saveImage(this.#context, id, path, options));
  }

  /** The image keeps the id that it was saved with. Throws CONFLICT if this host has that image already. */
  async load(path: string, options: LoadOptions = {}): Promise<ImageView> {
    const id = await imageIdIn(path);
    return this.find(await this.#locks.hold(id, () => loadImage(this.#context, path, options)));
  }
}

/** The list of an image's overlays may have files that its layers lack: the layers are only described at the commit. */
function isLayer(record: ImageRecord, path: string): boolean {
  return layerPaths(record).includes(path) || record.overlays.some(({ base }) => base.path === path);
}

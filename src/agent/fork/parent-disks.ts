/**
 * The disks of a VM that is forked. What it has written so far becomes a base that nobody writes to any more, and it
 * goes on in an overlay beside it: all disks at one moment, in the pause of the fork point. A parent that stays stopped
 * needs no overlay.
 *
 * Written down in this order: which overlays there will be (image record) → the overlays → the switch to them → where
 * the parent writes (its own record). Whoever finds this cut short asks the VM which file it has open.
 */
import { rm } from 'node:fs/promises';
import type { DiskFiles, OpenOverlay } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { ParentMode } from '../../domain/fork.js';
import type { DiskSpec } from '../../domain/vm.js';
import type { ImageDisk, ParentOverlay } from '../image/record.js';
import { withDisks } from '../vm/record.js';
import type { ManagedVm, VmManager } from '../vm/vms.js';
import type { ForkContext } from './context.js';

export class ParentDisks {
  readonly #context: ForkContext;
  readonly #parent: ManagedVm;
  readonly #image: string;
  /** What `snapshot` will switch to, or has. */
  #open: readonly OpenOverlay[] = [];

  constructor(context: ForkContext, parent: ManagedVm, image: string) {
    this.#context = context;
    this.#parent = parent;
    this.#image = image;
  }

  /** The parent runs. Its overlays are made, and QEMU has opened them. Again as often as wanted. */
  async prepare(mode: ParentMode): Promise<void> {
    const { images, vms } = this.#context;
    const { process, spec } = this.#parent;
    const { diskFiles } = vms.backend;
    const disks = spec.disks.filter(({ isReadOnly }) => !isReadOnly);
    if (mode === 'stop' || disks.length === 0) return;
    const overlays = disks.map((disk) => this.#overlayOf(disk));
    await images.update(this.#image, { overlays });
    this.#open = await process.disks.openOverlays(this.#image, overlays, async ({ path, base }) => {
      await rm(path, { force: true });
      await diskFiles.createOverlay(path, base, await diskFiles.virtualSizeBytes(base.path, base.format));
    });
  }

  /** The parent stands still: all its disks, or none. */
  async snapshot(): Promise<void> {
    if (this.#open.length > 0) await this.#parent.process.disks.switchToOverlays(this.#open);
  }

  /** Durable when it resolves: the parent's record names the files that it writes to now. */
  async settle(): Promise<void> {
    if (this.#open.length === 0) return;
    const { vms, images } = this.#context;
    const { overlays } = images.get(this.#image);
    await amendDisks(vms, this.#parent.spec.name, (disk) => overlays.find(({ id }) => id === disk.id) ?? disk);
  }

  /**
   * The parent runs on its own files again; what it has written since goes into them. Nothing to do for one that has
   * ended.
   */
  async undo(): Promise<void> {
    const { vms, images } = this.#context;
    const { name } = this.#parent.spec;
    if (!images.has(this.#image)) return;
    const { overlays } = images.get(this.#image);
    const isThere = vms.has(name) && vms.get(name) === this.#parent && this.#parent.state !== 'stopped';
    for (const [index, overlay] of overlays.entries()) {
      if (isThere) await this.#parent.process.disks.takeOut(this.#image, index, overlay, this.#open);
      else await mergeOffline(vms.backend.diskFiles, overlay);
      await rm(overlay.path, { force: true });
    }
    if (isThere && overlays.length > 0) {
      await amendDisks(vms, name, (disk) => overlays.find(({ id }) => id === disk.id)?.base ?? disk);
    }
  }

  #overlayOf({ id, path, format }: DiskSpec): ParentOverlay {
    const base: ImageDisk = { id, path, format };
    return { id, path: `${path}.${this.#image}`, format: 'qcow2', vm: this.#parent.spec.name, base };
  }
}

/** Durable when it resolves: the VM's record names these files. */
export async function amendDisks(
  vms: VmManager,
  name: string,
  fileOf: (disk: DiskSpec) => Pick<DiskSpec, 'path' | 'format'>,
): Promise<void> {
  await vms.amend(name, (record) => withDisks(record, fileOf));
}

/** Disks that no snapshot can be taken of, each with why. */
export async function diskBlockers(parent: ManagedVm): Promise<string[]> {
  if (parent.image !== null && parent.spec.disks.some(({ isReadOnly }) => !isReadOnly)) {
    return [`${parent.spec.name} is a clone, whose disks end with it`];
  }
  const known = new Set(parent.spec.disks.map(({ id }) => id));
  const active = await parent.process.disks.active();
  const foreign = [...active].filter(([id, { isReadOnly }]) => !known.has(id) && !isReadOnly);
  return foreign.map(([id, { path }]) => `${id} (${path}) is not among the disks of the spec`);
}

/** The VM that wrote to the overlay has ended. */
export async function mergeOffline(files: DiskFiles, overlay: ParentOverlay): Promise<void> {
  try {
    await files.commitOverlay(overlay.path);
  } catch (error) {
    const isGone = error instanceof MigrationError && /No such file/i.test(error.message);
    if (!isGone) throw error;
  }
  await rm(overlay.path, { force: true });
}

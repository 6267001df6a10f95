/**
 * The disks of a VM that is forked. Each file that the VM has written to becomes a base that no VM writes to any more.
 * The VM continues in an overlay beside it. All disks switch at the same moment, in the pause of the fork point. A
 * parent that stays stopped needs no overlay.
 *
 * The order of the writes is: the list of overlays (image record) → the overlays → the switch to them → the files that
 * the parent writes to (its own record). If a crash has interrupted this, the VM is asked which file it has open.
 */
import { rm } from 'node:fs/promises';
import type { OpenOverlay } from '../../backends/vm-disks.js';
import { MigrationError } from '../../domain/errors.js';
import type { ParentMode } from '../../domain/fork.js';
import type { DiskSpec, VmSpec } from '../../domain/vm.js';
import type { ImageDisk } from '../../engine/ports/fork.js';
import type { ParentOverlay } from '../image/record.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { amendDisks, mergeLive } from './live-merge.js';
import { handOn, mergeOffline, overlayPath } from './overlay-merge.js';

/** The longest chain of files below a disk. QEMU opens all of them, and each read may pass through all. */
const CHAIN_FILES_MAX = 16;

export class ParentDisks {
  readonly #context: ForkContext;
  readonly #parent: ManagedVm;
  readonly #image: string;
  /** The overlays that `snapshot` switches to, or has switched to. */
  #open: readonly OpenOverlay[] = [];

  constructor(context: ForkContext, parent: ManagedVm, image: string) {
    this.#context = context;
    this.#parent = parent;
    this.#image = image;
  }

  /** Makes the overlays and has QEMU open them, while the parent runs. Idempotent. */
  async prepare(mode: ParentMode): Promise<void> {
    const { images, vms } = this.#context;
    const { process, spec } = this.#parent;
    const { diskFiles } = vms.backend;
    const disks = spec.disks.filter(({ isReadOnly }) => !isReadOnly);
    if (mode === 'stop' || disks.length === 0) return;
    const [tooLong] = await longChains(this.#context, this.#parent);
    if (tooLong !== undefined) throw new MigrationError('CONFLICT', tooLong, { remedy: `vmctl flatten ${spec.name}` });
    const overlays = disks.map((disk) => this.#overlayOf(disk));
    // The removal of an older image may have left overlays to this one.
    const left = images.get(this.#image).overlays.filter((overlay) => !this.#isOwn(overlay));
    await images.update(this.#image, { overlays: [...left, ...overlays] });
    this.#open = await process.disks.openOverlays(this.#image, overlays, async ({ path, base }) => {
      await rm(path, { force: true });
      await diskFiles.createOverlay(path, base, await diskFiles.virtualSizeBytes(base.path, base.format));
    });
  }

  /** Switches all disks to their overlays, or none. The parent must be stopped. */
  async snapshot(): Promise<void> {
    if (this.#open.length > 0) await this.#parent.process.disks.switchToOverlays(this.#open);
  }

  /** Writes the new files into the parent's record. Durable when it resolves. */
  async settle(): Promise<void> {
    if (this.#open.length === 0) return;
    const { vms, images } = this.#context;
    const overlays = images.get(this.#image).overlays.filter((overlay) => this.#isOwn(overlay));
    await amendDisks(vms, this.#parent.spec.name, (disk) => overlays.find(({ id }) => id === disk.id) ?? disk);
  }

  undo(): Promise<void> {
    return undoOverlays(this.#context, this.#parent, this.#image);
  }

  #isOwn({ path }: ParentOverlay): boolean {
    return path.endsWith(`.${this.#image}`);
  }

  #overlayOf({ id, path, format }: DiskSpec): ParentOverlay {
    const base: ImageDisk = { id, path, format };
    return {
      id,
      path: overlayPath(path, this.#image),
      format: 'qcow2',
      vm: this.#parent.spec.name,
      base,
    };
  }
}

/**
 * Merges the overlays of an uncommitted fork into the parent's own files, and the parent uses these again. If it has
 * ended, or this host has it no more (null), the overlays are merged offline. Idempotent.
 */
export async function undoOverlays(context: ForkContext, parent: ManagedVm | null, image: string): Promise<void> {
  if (!context.images.has(image)) return;
  await context.diskServer.whileUnserved(image, () => mergeAll(context, parent, image));
}

async function mergeAll(context: ForkContext, parent: ManagedVm | null, image: string): Promise<void> {
  const { vms, images } = context;
  const isUp = (vm: ManagedVm): boolean =>
    vms.has(vm.spec.name) && vms.get(vm.spec.name) === vm && vm.state !== 'stopped';
  if (parent?.state === 'departed' && isUp(parent) && images.get(image).overlays.length > 0) {
    throw new MigrationError('CONFLICT', `${parent.spec.name} has moved, and uses the overlays on its new host`);
  }
  // The latest comes first. Those before it have been left to this image by another one.
  for (const overlay of images.get(image).overlays.toReversed()) {
    if (!overlay.path.endsWith(`.${image}`) && (await handOn(context, image, overlay))) continue;
    if (parent !== null && isUp(parent)) await undoOverlay(context, parent, overlay);
    else await mergeOffline(vms.backend.diskFiles, overlay);
  }
}

async function undoOverlay(context: ForkContext, parent: ManagedVm, overlay: ParentOverlay): Promise<void> {
  const { process, spec } = parent;
  // An overlay that no disk uses has no content: the fork has not come to its fork point.
  if (await process.disks.release(overlay.path)) return rm(overlay.path, { force: true });
  if (await mergeLive(context, parent, overlay)) return;
  throw new MigrationError('CONFLICT', `QEMU of ${spec.name} does not have ${overlay.base.path} open`);
}

/** Returns the reason for each disk that no snapshot can be taken of. */
export async function diskBlockers(parent: ManagedVm): Promise<string[]> {
  if (parent.image !== null && parent.spec.disks.some(({ isReadOnly }) => !isReadOnly)) {
    return [`${parent.spec.name} is a clone: its disks are removed when it ends`];
  }
  const served = parent.spec.disks.flatMap((disk) =>
    disk.served === undefined ? [] : [servedDisk(parent.spec, disk)],
  );
  if (served.length > 0) return served;
  const known = new Set(parent.spec.disks.map(({ id }) => id));
  const active = await parent.process.disks.active();
  const foreign = [...active].filter(([id, { isReadOnly }]) => !known.has(id) && !isReadOnly);
  return foreign.map(([id, { path }]) => `${id} (${path}) is not among the disks of the spec`);
}

/** Returns the reason for each disk whose chain of files has no room for another overlay. */
export async function longChains({ vms }: Pick<ForkContext, 'vms'>, parent: ManagedVm): Promise<string[]> {
  const reasons: string[] = [];
  for (const { id, path, format, isReadOnly, served } of parent.spec.disks) {
    if (isReadOnly || format === 'raw' || served !== undefined) continue;
    const { length } = await vms.backend.diskFiles.chain(path, format);
    if (length >= CHAIN_FILES_MAX) reasons.push(`disk ${id} of ${parent.spec.name} is a chain of ${length} files`);
  }
  return reasons;
}

/** Why no image can be taken of a VM with this disk. */
export function servedDisk({ name }: Pick<VmSpec, 'name'>, { id, served }: DiskSpec): string {
  return `${name} reads disk ${id} from ${served?.host ?? ''}: an image cannot have it`;
}

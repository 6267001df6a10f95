/**
 * Merges the overlays that parents have written to since their fork: offline if the VM of the overlay has ended, else
 * through its QEMU (live-merge.ts).
 */
import { access } from 'node:fs/promises';
import type { DiskFiles } from '../../backends/disk-files.js';
import type { KeptLayer } from '../../domain/image.js';
import { layerPaths } from '../image/layer-holders.js';
import type { ImageRecord, ParentOverlay } from '../image/record.js';
import { mergesDisks } from '../vm/record.js';
import type { ForkContext } from './context.js';
import { mergeLive, removeOverlay, whileMerging } from './live-merge.js';

/** An overlay is named by the disk's first file and the image's id, so no name grows with the number of forks. */
const OVERLAY_SUFFIX = /\.[0-9a-f]{16}$/;
/** Returns the path of the overlay that a fork with this image makes for a disk. */
export function overlayPath(path: string, image: string): string {
  return `${path.replace(OVERLAY_SUFFIX, '')}.${image}`;
}

/** True if `path` is an overlay that a fork has made on `base`, and not one of the user's own. */
export function isOverlayOf(path: string, base: string): boolean {
  if (!OVERLAY_SUFFIX.test(path)) return false;
  const stem = path.replace(OVERLAY_SUFFIX, '');
  // Build 0.1.0 appended the id to the name of the overlay before.
  return stem === base || stem === base.replace(OVERLAY_SUFFIX, '');
}

/**
 * Merges each overlay of the image into its backing file, also while the overlay's VM runs, and returns the files that
 * are gone. If another image uses the overlay or its backing file as a disk, the overlay stays and that image merges it
 * later. The caller has made sure that no other host needs the layers: after the parent has moved, `flatten` on its
 * host merges. qemu-img refuses to merge an overlay that is in use.
 */
export async function mergeOverlays(context: ForkContext, id: string): Promise<string[]> {
  const { images } = context;
  const { overlays } = images.get(id);
  const merged: string[] = [];
  // The latest overlay comes first, because its backing file may be an earlier overlay.
  for (const overlay of overlays.toReversed()) {
    if (!(await handOn(context, id, overlay)) && (await merge(context, overlay))) merged.push(overlay.path);
    await images.update(id, { overlays: images.get(id).overlays.filter(({ path }) => path !== overlay.path) });
  }
  return merged;
}

/** Leaves the overlay to another image that needs its layers and is kept. Returns false if there is none. */
export async function handOn({ images }: ForkContext, id: string, overlay: ParentOverlay): Promise<boolean> {
  const heir = images.all().find((image) => image.id !== id && isKept(image) && needs(image, overlay));
  if (heir !== undefined) await images.update(heir.id, { overlays: [overlay, ...heir.overlays] });
  return heir !== undefined;
}

/** Returns the overlays that nobody has merged. */
export async function overlaysLeft({ overlays }: ImageRecord): Promise<ParentOverlay[]> {
  const left = await Promise.all(overlays.map(({ path }) => isThere(path)));
  return overlays.filter((_, index) => left[index] === true);
}

/** Returns the overlays of the image whose VMs have moved to other hosts and still need them. */
export async function overlaysElsewhere({ images, registry, host }: ForkContext, id: string): Promise<KeptLayer[]> {
  const kept: KeptLayer[] = [];
  for (const { vm, path } of await overlaysLeft(images.get(id))) {
    const owner = await registry.owner(vm);
    if (owner === null || owner.owner === host) continue;
    kept.push({ path, reason: `${vm} belongs to ${owner.owner}: "vmctl flatten ${vm}" there merges it` });
  }
  return kept;
}

/** Throws if the file system does not say: a file that cannot be reached now may have content that nobody else has. */
async function isThere(path: string): Promise<boolean> {
  try {
    await access(path);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  }
}

/**
 * True if nobody deletes the image without a look at its list of overlays. One that is not committed may be deleted at
 * any time, as those of the pool are, until its fork has made overlays: then the undo goes through that list.
 */
function isKept({ state, overlays }: ImageRecord): boolean {
  return state !== 'capturing' || overlays.length > 0;
}

function needs(image: ImageRecord, { path, base }: ParentOverlay): boolean {
  const paths = layerPaths(image);
  return paths.includes(path) || paths.includes(base.path);
}

async function merge(context: ForkContext, overlay: ParentOverlay): Promise<boolean> {
  const { vms } = context;
  const name = overlay.vm;
  const vm = vms.has(name) ? vms.get(name) : null;
  if (vm?.isMerging === true) throw mergesDisks(name);
  if (vm !== null && vm.state !== 'stopped' && vm.state !== 'departed') {
    const { disks } = vm.process;
    if (await disks.isOpen(overlay.path)) return whileMerging(context, name, () => mergeLive(context, vm, overlay));
    // It has merged the overlay. Any other VM has only the name of the one that has written to the overlay.
    if (await disks.isOpen(overlay.base.path)) return false;
  }
  return mergeOffline(vms.backend.diskFiles, overlay);
}

/**
 * Merges an overlay whose VM has ended, and removes it. Returns false if the overlay is missing. If a file below it is
 * missing, that is an error and the overlay stays.
 */
export async function mergeOffline(files: DiskFiles, overlay: ParentOverlay): Promise<boolean> {
  if (!(await isThere(overlay.path))) return false;
  await files.commitOverlay(overlay.path, overlay.base.path);
  await removeOverlay(overlay.path);
  return true;
}

/** Merges the overlays that parents have written to since their fork, when the image is removed. */
import { access, rm } from 'node:fs/promises';
import type { KeptLayer } from '../../domain/image.js';
import type { ImageRecord, ParentOverlay } from '../image/record.js';
import type { ForkContext } from './context.js';
import { layerPaths } from './layer-holders.js';
import { amendDisks, mergeOffline } from './parent-disks.js';

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
    const heir = images.all().find((image) => image.id !== id && needs(image, overlay));
    if (heir !== undefined) await images.update(heir.id, { overlays: [overlay, ...heir.overlays] });
    else if (await merge(context, overlay)) merged.push(overlay.path);
    await images.update(id, { overlays: images.get(id).overlays.filter(({ path }) => path !== overlay.path) });
  }
  return merged;
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

function isThere(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}

function needs(image: ImageRecord, { path, base }: ParentOverlay): boolean {
  const paths = layerPaths(image);
  return paths.includes(path) || paths.includes(base.path);
}

async function merge({ vms }: ForkContext, overlay: ParentOverlay): Promise<boolean> {
  const name = overlay.vm;
  const vm = vms.has(name) ? vms.get(name) : null;
  if (vm === null || vm.state === 'stopped' || vm.state === 'departed') {
    if (!(await isThere(overlay.path))) return false;
    await mergeOffline(vms.backend.diskFiles, overlay);
    return true;
  }
  const disk = vm.spec.disks.find(({ id }) => id === overlay.id);
  // Without this disk, or with another file open, it is a different VM of the same name.
  if (disk === undefined || !(await vm.process.disks.merge(overlay))) return false;
  if (disk.path === overlay.path) {
    await amendDisks(vms, name, (own) => (own.id === overlay.id ? overlay.base : own));
  }
  await rm(overlay.path, { force: true });
  return true;
}

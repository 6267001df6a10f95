/** Merges the overlays that parents have written to since their fork, when the image is removed. */
import { rm } from 'node:fs/promises';
import type { KeptLayer } from '../../domain/image.js';
import type { ImageRecord, ParentOverlay } from '../image/record.js';
import type { ForkContext } from './context.js';
import { layerPaths } from './layer-holders.js';
import { amendDisks, mergeOffline } from './parent-disks.js';

/**
 * Merges each overlay of the image into its backing file, also while the overlay's VM runs, and returns the files that
 * are gone. If another image uses the overlay or its backing file as a disk, the overlay stays and that image merges it
 * later. If the VM has moved to another host, the overlay stays, because the VM needs it there: `flatten` on that host
 * merges it.
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

/** Returns the overlays of the image whose VMs have moved to other hosts. Their chains travel with the specs. */
export async function overlaysElsewhere({ images, registry, host }: ForkContext, id: string): Promise<KeptLayer[]> {
  const kept: KeptLayer[] = [];
  for (const { vm, path } of images.get(id).overlays) {
    const owner = await registry.owner(vm);
    if (owner === null || owner.owner === host) continue;
    kept.push({ path, reason: `${vm} runs on ${owner.owner}: "vmctl flatten ${vm}" there merges it` });
  }
  return kept;
}

function needs(image: ImageRecord, { path, base }: ParentOverlay): boolean {
  const paths = layerPaths(image);
  return paths.includes(path) || paths.includes(base.path);
}

async function merge({ vms, registry, host }: ForkContext, overlay: ParentOverlay): Promise<boolean> {
  const name = overlay.vm;
  const vm = vms.has(name) ? vms.get(name) : null;
  const owner = await registry.owner(name);
  if (owner !== null && owner.owner !== host) return false;
  if (vm === null || vm.state === 'stopped') {
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

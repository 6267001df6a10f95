/** Merges the overlays that parents have written to since their fork, when the image is removed. */
import { rm } from 'node:fs/promises';
import type { ImageRecord, ParentOverlay } from '../image/record.js';
import type { ForkContext } from './context.js';
import { amendDisks, mergeOffline } from './parent-disks.js';

/**
 * Merges each overlay of the image into its backing file, also while the overlay's VM runs. If another image uses the
 * overlay or its backing file as a disk, the overlay stays and that image merges it later. If the VM has moved to
 * another
 * host, the overlay stays for good, because the VM needs it there.
 */
export async function mergeOverlays(context: ForkContext, id: string): Promise<void> {
  const { images } = context;
  const { overlays } = images.get(id);
  // The latest overlay comes first, because its backing file may be an earlier overlay.
  for (const overlay of overlays.toReversed()) {
    const heir = images.all().find((image) => image.id !== id && needs(image, overlay));
    if (heir === undefined) await merge(context, overlay);
    else await images.update(heir.id, { overlays: [overlay, ...heir.overlays] });
    await images.update(id, { overlays: images.get(id).overlays.filter(({ path }) => path !== overlay.path) });
  }
}

function needs({ disks }: ImageRecord, { path, base }: ParentOverlay): boolean {
  return disks.some((disk) => disk.path === path || disk.path === base.path);
}

async function merge({ vms, registry, host }: ForkContext, overlay: ParentOverlay): Promise<void> {
  const name = overlay.vm;
  const vm = vms.has(name) ? vms.get(name) : null;
  const owner = await registry.owner(name);
  if (owner !== null && owner.owner !== host) return;
  if (vm === null || vm.state === 'stopped') return mergeOffline(vms.backend.diskFiles, overlay);
  const disk = vm.spec.disks.find(({ id }) => id === overlay.id);
  // Without this disk, or with another file open, it is a different VM of the same name.
  if (disk === undefined || !(await vm.process.disks.merge(overlay))) return;
  if (disk.path === overlay.path) {
    await amendDisks(vms, name, (own) => (own.id === overlay.id ? overlay.base : own));
  }
  await rm(overlay.path, { force: true });
}

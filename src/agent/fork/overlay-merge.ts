/** What becomes of the files that parents went on in, once their image is not needed any more. */
import { rm } from 'node:fs/promises';
import type { ImageRecord, ParentOverlay } from '../image/record.js';
import type { ForkContext } from './context.js';
import { amendDisks, mergeOffline } from './parent-disks.js';

/**
 * Each overlay goes into the file that it lies on, while its VM runs if it does. One that is another image's disk by
 * now stays, and is that image's to merge; one whose VM has moved to another host stays for good, because the VM needs
 * it there.
 */
export async function mergeOverlays(context: ForkContext, id: string): Promise<void> {
  const { images } = context;
  const { overlays } = images.get(id);
  // The latest first: what lies on another overlay goes into that one.
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
  // Another VM of that name.
  if (disk === undefined || !(await vm.process.disks.merge(overlay))) return;
  if (disk.path === overlay.path) {
    await amendDisks(vms, name, (own) => (own.id === overlay.id ? overlay.base : own));
  }
  await rm(overlay.path, { force: true });
}

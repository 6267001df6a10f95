/**
 * Merges the overlays that parents have written to since their fork, also while the VM of an overlay runs.
 *
 * An overlay is merged offline if its VM has ended before it was merged. That must never put old content over new. So
 * this holds at every moment: while an overlay exists, its VM has not written to the base. At the switch the VM is
 * paused until its record names the base and the overlay is deleted. A mark in the record tells the next daemon of an
 * interrupted merge (`resumeMerges`).
 */
import { access, rm } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import type { DiskFiles } from '../../backends/disk-files.js';
import type { AtSwitch } from '../../backends/vm-disks.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { KeptLayer } from '../../domain/image.js';
import type { DiskSpec } from '../../domain/vm.js';
import type { ImageRecord, ParentOverlay } from '../image/record.js';
import { mergesDisks, withDisks } from '../vm/record.js';
import type { ManagedVm, VmManager } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { layerPaths } from './layer-holders.js';

/** An overlay is named by the disk's first file and the image's id, so no name grows with the number of forks. */
const OVERLAY_SUFFIX = /\.[0-9a-f]{16}$/;
/** How often a VM that does not answer is asked again. */
const RETRY_MS = 1_000;

/** What a merge needs to know of an overlay. */
type Overlay = Pick<ParentOverlay, 'id' | 'path' | 'format' | 'base'>;

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
  return disk !== undefined && whileMerging(vms, name, () => mergeLive(vms, vm, overlay));
}

/** Keeps jobs away from the VM during `work`. Throws VM_BUSY if a job has it, or if its disks are being merged. */
export async function whileMerging<T>(vms: VmManager, name: string, work: () => Promise<T>): Promise<T> {
  await vms.amend(name, ({ job, isMerging }) => {
    if (job !== null) throw new MigrationError('VM_BUSY', `${name} is part of job ${job}`);
    if (isMerging === true) throw mergesDisks(name);
    return { isMerging: true };
  });
  try {
    return await work();
  } finally {
    if (vms.has(name)) await vms.amend(name, () => ({ isMerging: false }));
  }
}

/** Merges the overlay and removes it. Returns false if the VM has no such chain. To be called in `whileMerging`. */
export async function mergeLive(vms: VmManager, { process, spec }: ManagedVm, overlay: Overlay): Promise<boolean> {
  const isMerged = await process.disks.merge(overlay, switchTo(vms, spec.name, overlay));
  // An overlay between others is still there.
  if (isMerged) await rm(overlay.path, { force: true });
  return isMerged;
}

/** Returns the switch from the overlay to its base, for a VM that runs on. */
export function switchTo(vms: VmManager, name: string, overlay: Overlay): AtSwitch {
  return (complete) =>
    vms.whilePaused(name, async () => {
      await complete();
      await useBase(vms, name, overlay);
    });
}

async function useBase(vms: VmManager, name: string, { id, path, base }: Overlay): Promise<void> {
  await amendDisks(vms, name, (disk) => (disk.id === id ? base : disk));
  await rm(path, { force: true });
}

/**
 * Ends what an earlier daemon has left of merges: a disk that has switched stays on its base, any other on its overlay,
 * and the VM runs on. Waits for VMs that do not answer at once, until `signal` aborts.
 */
export async function resumeMerges(context: ForkContext, signal: AbortSignal): Promise<void> {
  const { vms, log } = context;
  const isUp = ({ state }: ManagedVm): boolean => state === 'running' || state === 'paused';
  await Promise.all(
    vms
      .all()
      .filter(({ isMerging }) => isMerging)
      .map(async (vm) => {
        while (!signal.aborted && vms.has(vm.spec.name)) {
          try {
            if (isUp(vm)) await resumeMerge(context, vm);
            // A process that has ended merges nothing.
            return await vms.amend(vm.spec.name, () => ({ isMerging: false }));
          } catch (error) {
            if (signal.aborted) return;
            const err = toMigrationError(error);
            log.warn({ vm: vm.spec.name, err }, 'an interrupted merge of a disk cannot be ended yet');
            await sleep(RETRY_MS, undefined, { signal }).catch(() => undefined);
          }
        }
      }),
  );
}

async function resumeMerge({ vms }: ForkContext, { process, spec }: ManagedVm): Promise<void> {
  await process.connected();
  await process.disks.abandonMerges();
  const active = await process.disks.active();
  for (const { id, path, format } of spec.disks) {
    const base = active.get(id)?.path ?? path;
    if (!isOverlayOf(path, base)) continue;
    const chain = await vms.backend.diskFiles.chain(path, format);
    const below = chain[1];
    if (below?.path !== base) continue;
    await process.disks.close(path);
    await useBase(vms, spec.name, { id, path, format: 'qcow2', base: { id, ...below } });
  }
  await vms.restoreRunState(spec.name);
}

/** Writes these disk files into the VM's record. Durable when it resolves. */
export async function amendDisks(
  vms: VmManager,
  name: string,
  fileOf: (disk: DiskSpec) => Pick<DiskSpec, 'path' | 'format'>,
): Promise<void> {
  await vms.amend(name, (record) => withDisks(record, fileOf));
}

/** Merges an overlay whose VM has ended. Does nothing if the overlay is missing. */
export async function mergeOffline(files: DiskFiles, overlay: ParentOverlay): Promise<void> {
  try {
    await files.commitOverlay(overlay.path);
  } catch (error) {
    const isGone = error instanceof MigrationError && /No such file/i.test(error.message);
    if (!isGone) throw error;
  }
  await rm(overlay.path, { force: true });
}

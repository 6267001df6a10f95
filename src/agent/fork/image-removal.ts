/**
 * Removes an image. Its memory goes at once. Its disk layers go only when nobody needs them: the parents' overlays are
 * merged into their backing files, and the record goes with them. Otherwise the image stays listed as `unloaded`, and
 * a later removal tries again.
 */
import { MigrationError } from '../../domain/errors.js';
import type { ImageRemoval, KeptLayer } from '../../domain/image.js';
import { holdersElsewhere, keptBecause, layerPaths, type OtherHosts } from '../image/layer-holders.js';
import type { ImageRecord } from '../image/record.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { mergeOverlays, overlaysElsewhere, overlaysLeft } from './overlay-merge.js';

export interface RemoveOptions {
  /** Merges the layers although another host may need them, owns their VM or cannot be asked. */
  readonly isForced: boolean;
  /** Gives up the saved files that need the layers. They are refused once a layer has changed. */
  readonly isDroppingSaved: boolean;
}

/** Returns the layers that would stay if the image were removed now. Changes nothing. */
export async function planRemoval(
  context: ForkContext,
  others: OtherHosts,
  id: string,
  { isForced, isDroppingSaved }: RemoveOptions,
): Promise<{ readonly kept: readonly KeptLayer[] }> {
  const record = context.images.get(id);
  const saves = isDroppingSaved ? [] : (record.saves ?? []).map(({ path }) => `saved image ${path}`);
  if (saves.length > 0) return { kept: keptBecause(layerPaths(record), saves) };
  if (isForced) return { kept: [] };
  const elsewhere = await overlaysElsewhere(context, id);
  if (elsewhere.length > 0) return { kept: elsewhere };
  // Only a merge changes a layer, and only disks that came with a file are removed.
  const overlays = await overlaysLeft(record);
  const changed = [...overlays.flatMap(({ path, base }) => [path, base.path]), ...broughtPaths(context, record)];
  const holders = changed.length === 0 ? [] : await holdersElsewhere(others, record.spec, changed);
  if (holders.length > 0) return { kept: keptBecause(changed, holders) };
  const { servedTo = [] } = record;
  const unknown = servedTo.filter((name) => !others.names.includes(name));
  if (unknown.length > 0)
    return {
      kept: keptBecause(
        layerPaths(record),
        unknown.map((name) => `host ${name}, no peer`),
      ),
    };
  const readers: OtherHosts = {
    names: others.names.filter((name) => servedTo.includes(name)),
    agent: (host) => others.agent(host),
  };
  const disks = record.disks.map(({ path }) => path);
  const reading = servedTo.length === 0 ? [] : await holdersElsewhere(readers, record.spec, disks);
  return { kept: keptBecause(disks, reading) };
}

function broughtPaths({ images }: ForkContext, record: ImageRecord): string[] {
  return layerPaths(record).filter((path) => path.startsWith(`${images.disksDirectory(record.id)}/`));
}

/** The caller has checked that no clone and no fork needs the image. */
export async function removeImage(
  context: ForkContext,
  others: OtherHosts,
  id: string,
  options: RemoveOptions,
): Promise<ImageRemoval> {
  const { images } = context;
  // The saved files are given up even if the layers stay for another reason.
  if (options.isDroppingSaved) {
    const { saves: _, ...record } = images.get(id);
    await images.replace(id, record);
  }
  const { kept } = await planRemoval(context, others, id, options);
  const freedBytes = images.view(id).allocatedBytes;
  if (kept.length > 0) {
    // The record also keeps VMs from being run on a disk without its overlay.
    await images.unload(id);
    return { id, freedBytes, mergedDisks: [], keptLayers: kept };
  }
  return context.diskServer.whileUnserved(id, async () => {
    const mergedDisks = await mergeOverlays(context, id);
    await images.delete(id);
    return { id, freedBytes, mergedDisks, keptLayers: [] };
  });
}

/**
 * Throws CONFLICT if a clone reads one of the image's layers below its own disk. Such a clone may have private memory,
 * so that it does not need the image any more, but removing the image would write to the layer or remove it.
 */
export async function refuseIfBackingFile(context: ForkContext, id: string): Promise<void> {
  const { vms, images } = context;
  const record = images.get(id);
  const isUp = ({ state }: ManagedVm) => state === 'running' || state === 'paused';
  const clones = vms.all().filter((vm) => vm.spec.clone !== undefined && isUp(vm));
  const parents = new Set(record.overlays.map(({ vm }) => vm));
  const reader = clones.find(({ spec }) => spec.disks.some(({ served }) => served?.image === id));
  if (reader !== undefined) {
    throw new MigrationError('CONFLICT', `${reader.spec.name} reads disks of image ${id} on ${record.served?.host}`, {
      remedy: `vmctl stop ${reader.spec.name}`,
    });
  }
  for (const path of new Set([...record.overlays.map(({ base }) => base.path), ...broughtPaths(context, record)])) {
    for (const clone of clones) {
      if (parents.has(clone.spec.name) || !(await clone.process.disks.isOpen(path))) continue;
      throw new MigrationError('CONFLICT', `${clone.spec.name} uses disk ${path} of image ${id} as a backing file`, {
        remedy: `vmctl stop ${clone.spec.name}`,
      });
    }
  }
}

/**
 * Merges the overlays that forks have left below a VM's disks, from the top of the chain down to the first layer that
 * somebody needs. The host that runs the VM does this: the chain travels with the VM's spec, and only the VM's QEMU may
 * merge while it runs. Backing files of the user's own are left alone.
 */
import type { DiskFile } from '../../backends/disk-files.js';
import { MigrationError } from '../../domain/errors.js';
import type { FlattenReport, KeptLayer } from '../../domain/image.js';
import { holdersElsewhere, holdersHere, keptBecause, type OtherHosts } from '../image/layer-holders.js';
import type { ForkContext } from './context.js';
import { mergeEnded, mergeLive, whileMerging } from './live-merge.js';
import { isOverlayOf } from './overlay-merge.js';

/** Throws CONFLICT if the VM does not belong to this host or is being started, VM_BUSY if a job has it. */
export async function flattenVm(context: ForkContext, others: OtherHosts, name: string): Promise<FlattenReport> {
  context.vms.get(name);
  return whileMerging(context, name, () => flatten(context, others, name));
}

async function flatten(context: ForkContext, others: OtherHosts, name: string): Promise<FlattenReport> {
  const { vms } = context;
  const vm = vms.get(name);
  const isEnded = vm.state === 'stopped';
  if (!isEnded && vm.state !== 'running' && vm.state !== 'paused') {
    throw new MigrationError('CONFLICT', `${name} is ${vm.state}`);
  }
  const mergedDisks: string[] = [];
  const keptLayers: KeptLayer[] = [];
  for (const { id, isReadOnly, path, format, served } of vm.spec.disks) {
    if (isReadOnly || served !== undefined) continue;
    const chain = await vms.backend.diskFiles.chain(path, format);
    const mergeable = overlaysAtTop(chain);
    for (const [index, overlay] of mergeable.entries()) {
      const base = chain[index + 1];
      if (base === undefined) break;
      const paths = [overlay.path, base.path];
      const holders = [
        ...(await holdersHere(context, paths, name)),
        ...(await holdersElsewhere(others, vm.spec, paths, name)),
      ];
      if (holders.length > 0) {
        keptLayers.push(...keptBecause([base.path], holders));
        break;
      }
      const merged = { id, path: overlay.path, format: 'qcow2' as const, base: { id, ...base } };
      if (isEnded) await mergeEnded(context, vm, merged);
      else if (!(await mergeLive(context, vm, merged))) {
        throw new MigrationError('CONFLICT', `QEMU of ${name} does not have ${overlay.path} above ${base.path} open`);
      }
      mergedDisks.push(overlay.path);
    }
  }
  return { vm: name, mergedDisks, keptLayers };
}

/** Returns the overlays of forks at the top of the chain. */
function overlaysAtTop(chain: readonly DiskFile[]): readonly DiskFile[] {
  const end = chain.findIndex(({ path }, index) => !isOverlayOf(path, chain[index + 1]?.path ?? ''));
  return chain.slice(0, end);
}

/** What pre-flight wants to know of one VM: its memory as the VM itself, the kernel and the record have it. */
import { readFile } from 'node:fs/promises';
import type { HostContext } from '../vm/context.js';
import type { ManagedVm } from '../vm/vm.js';

export interface RamFacts {
  readonly isRamShared: boolean;
  readonly isRamNamedFile: boolean;
}

/** Memory of its process that is in no file: of a clone, what it has written, and the process's own. */
export async function ownBytes(vm: ManagedVm): Promise<number> {
  const rollup = await readFile(`/proc/${vm.pid}/smaps_rollup`, 'utf8');
  return Number(/^Anonymous:\s+(\d+) kB$/m.exec(rollup)?.[1] ?? 0) * 1024;
}

/** A clone's overlays lie in its directory, on disks that its parent may be given back. */
export function fleetingDisks({ spec, directory }: ManagedVm): string[] {
  if (spec.clone === undefined) return [];
  return spec.disks.filter(({ path }) => path.startsWith(`${directory}/`)).map(({ id }) => id);
}

export function ramAllocatedBytes(native: HostContext['native'], vm: ManagedVm): number {
  return vm.regions.reduce((sum, { path }) => sum + Number(native.allocatedBytes(path)), 0);
}

/** As the VM says, not its spec alone. */
export async function ramFacts(vm: ManagedVm): Promise<RamFacts> {
  const { regions } = vm.spec.memory;
  const shared = await vm.process.facts.sharedRegions();
  // It believes so of a clone's, which is not: its writes are in no file.
  const isRamShared = vm.image === null && regions.every(({ id }) => shared.has(id));
  return { isRamShared, isRamNamedFile: isRamShared && vm.regions.length === regions.length };
}

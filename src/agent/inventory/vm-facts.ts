/** Collects what pre-flight asks about a VM's memory, from the VM itself, the kernel and the record. */
import { readFile } from 'node:fs/promises';
import type { HostContext } from '../vm/context.js';
import type { ManagedVm } from '../vm/vm.js';

export interface RamFacts {
  readonly isRamShared: boolean;
  readonly isRamNamedFile: boolean;
}

/** Returns the memory of the process that is in no file: the pages that a clone has written, and the process's own. */
export async function ownBytes(vm: ManagedVm): Promise<number> {
  const rollup = await readFile(`/proc/${vm.pid}/smaps_rollup`, 'utf8');
  return Number(/^Anonymous:\s+(\d+) kB$/m.exec(rollup)?.[1] ?? 0) * 1024;
}

/** Returns the disks that end with a clone: its overlays, which are in its directory. */
export function fleetingDisks({ spec, directory }: ManagedVm): string[] {
  if (spec.clone === undefined) return [];
  return spec.disks.filter(({ path }) => path.startsWith(`${directory}/`)).map(({ id }) => id);
}

export function ramAllocatedBytes(native: HostContext['native'], vm: ManagedVm): number {
  return vm.regions.reduce((sum, { path }) => sum + Number(native.allocatedBytes(path)), 0);
}

/** Asks the VM, because its spec alone does not decide. */
export async function ramFacts(vm: ManagedVm): Promise<RamFacts> {
  const { regions } = vm.spec.memory;
  const shared = await vm.process.facts.sharedRegions();
  // QEMU reports a clone's memory as shared although it is not: the clone's writes are in no file.
  const isRamShared = vm.image === null && regions.every(({ id }) => shared.has(id));
  return { isRamShared, isRamNamedFile: isRamShared && vm.regions.length === regions.length };
}

/** What pre-flight wants to know of one VM and of this host, asked from QEMU and the kernel. */
import { readFile } from 'node:fs/promises';
import type { ManagedVm } from '../../agent/vm/vm.js';
import type { NativeBinding } from '../../native/types.js';

export interface RamFacts {
  readonly isRamShared: boolean;
  readonly isRamNamedFile: boolean;
}

/** Devices whose state QEMU can move but whose memory accesses bypass our page faults. */
const PASSTHROUGH = /^child<(vfio-|pci-assign|vhost-vdpa)/;
/** They punch holes into the memory's files. */
const DISCARDING = /^child<(virtio-(?:balloon|mem)[^>]*)>$/;
const DEVICE_CONTAINERS = ['/machine/peripheral', '/machine/peripheral-anon'];

/**
 * What QEMU itself gives as reason against migration, and devices that post-copy cannot serve. Empty: nothing is in the
 * way.
 */
export async function migrationBlockers(vm: ManagedVm): Promise<string[]> {
  const migration = await vm.qmp.execute('query-migrate');
  const blockers = [...(migration['blocked-reasons'] ?? [])];
  for (const path of DEVICE_CONTAINERS) {
    for (const { name, type } of await vm.qmp.execute('qom-list', { path })) {
      if (PASSTHROUGH.test(type)) blockers.push(`device ${name} (${type.slice(6, -1)}) passes host hardware through`);
    }
  }
  return blockers;
}

/** Devices by which the guest gives pages back to the host. */
export async function discardingDevices(vm: ManagedVm): Promise<string[]> {
  const found: string[] = [];
  for (const path of DEVICE_CONTAINERS) {
    for (const { type } of await vm.qmp.execute('qom-list', { path })) {
      const [, device] = DISCARDING.exec(type) ?? [];
      if (device !== undefined) found.push(device);
    }
  }
  return found;
}

/** Memory of its QEMU's that is in no file: of a clone, what it has written, and QEMU's own. */
export async function ownBytes(vm: ManagedVm): Promise<number> {
  const rollup = await readFile(`/proc/${vm.pid}/smaps_rollup`, 'utf8');
  return Number(/^Anonymous:\s+(\d+) kB$/m.exec(rollup)?.[1] ?? 0) * 1024;
}

/** A clone's overlays lie in its directory, on disks that its parent may be given back. */
export function fleetingDisks({ spec, directory }: ManagedVm): string[] {
  if (spec.clone === undefined) return [];
  return spec.disks.filter(({ path }) => path.startsWith(`${directory}/`)).map(({ id }) => id);
}

export function ramAllocatedBytes(native: NativeBinding, vm: ManagedVm): number {
  return vm.regions.reduce((sum, { path }) => sum + Number(native.allocatedBytes(path)), 0);
}

/** From QEMU, not from the spec alone: an adopted VM's `qemuArgs` may say otherwise. */
export async function ramFacts(vm: ManagedVm): Promise<RamFacts> {
  const backends = await vm.qmp.execute('query-memdev');
  const wanted = vm.spec.memory.regions.map((region) => backends.find((backend) => backend.id === region.id));
  // QEMU believes so of a clone's, which is not: its writes are in no file.
  const isRamShared = vm.image === null && wanted.every((backend) => backend?.share === true);
  return { isRamShared, isRamNamedFile: isRamShared && vm.regions.length === wanted.length };
}

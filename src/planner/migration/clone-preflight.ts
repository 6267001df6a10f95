/**
 * What stands in the way of a clone that is to leave its host, beside what any VM may meet. Pure, as all of pre-flight.
 */

import type { HostInventory, VmInventory } from '../../domain/host.js';
import { type MigrationRequest, MODE_TRAITS } from '../../domain/migration.js';
import type { Refusal, RefusalCode } from '../../domain/refusal.js';
import { type Transport, type TransportTable, transportRow } from '../../domain/transport.js';

const MIB = 1024 * 1024;

export function* checkClone(request: MigrationRequest, source: HostInventory, vm: VmInventory): Iterable<Refusal> {
  const { vm: name, mode } = request;
  if (vm.identityIssue !== null) {
    yield refuse(
      'IDENTITY_PENDING',
      `${name} lacks an identity of its own: ${vm.identityIssue}`,
      `wait until "vmctl show ${name}" says nothing of it; a clone that never gets one has to be stopped and forked anew, with --network isolated or none`,
    );
  }
  for (const disk of vm.fleetingDisks) {
    yield refuse(
      'DISK_NOT_MOVABLE',
      `the disk ${disk} of ${name} is an overlay that ends with the clone on ${source.host}`,
      'fork a VM whose disks are read-only: those are shared, and a clone can take them along',
    );
  }
  if (MODE_TRAITS[mode].mover === 'pager') yield* checkMemory(request, source, vm);
}

function* checkMemory({ vm: name }: MigrationRequest, source: HostInventory, vm: VmInventory): Iterable<Refusal> {
  const { image, spec } = vm;
  if (image === null) return;
  if (spec.memory.backing !== 'image') {
    yield refuse('VM_FILLING', `pages of ${name} are still on their way to it`, 'wait until its fork is done');
    return;
  }
  if (!image.isComplete) {
    yield refuse(
      'IMAGE_INCOMPLETE',
      `image ${image.id}, on which ${name} runs, is still being filled`,
      'wait until it is complete: "vmctl images"',
    );
  }
  if (!spec.hasPreload) {
    yield refuse(
      'RAM_NOT_SHARED',
      `${name} runs without the preload library: its QEMU would send its memory along`,
      'use --native, or fork a VM that was run with preload',
    );
  }
  const availableBytes = Math.min(source.memoryAvailableBytes, source.ramFileFreeBytes);
  if (!(availableBytes >= image.ownBytes)) {
    yield refuse(
      'SOURCE_MEMORY',
      `what ${name} has written is copied to a file before it is fetched, up to ${mib(image.ownBytes)}; ${source.host} has ${mib(availableBytes)}`,
      `free memory on ${source.host}`,
    );
  }
}

/** Why this transport cannot serve the VM's memory, or null. */
export function cloneObstacle(
  transport: Transport,
  { image, spec }: VmInventory,
  table?: TransportTable,
): Refusal | null {
  const { readsProcessMemory, title, processMemoryObstacle = `${title} cannot read` } = transportRow(transport, table);
  if (image === null || readsProcessMemory) return null;
  return refuse(
    'TRANSPORT_UNAVAILABLE',
    `the memory of ${spec.name} is partly its image's and partly its own, which ${processMemoryObstacle}`,
    'use --tcp',
  );
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}

function mib(bytes: number): string {
  return Number.isFinite(bytes) ? `${Math.ceil(bytes / MIB)} MiB` : 'nothing';
}

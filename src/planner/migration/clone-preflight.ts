/** Checks that apply only to the migration of a clone. Pure, like all of pre-flight. */

import type { HostInventory, VmInventory } from '../../domain/host.js';
import { type MigrationRequest, MODE_TRAITS } from '../../domain/migration.js';
import type { Refusal, RefusalCode } from '../../domain/refusal.js';
import { type Transport, type TransportTable, transportRow } from '../../domain/transport.js';
import { neededMib } from '../bytes.js';

export function* checkClone(request: MigrationRequest, source: HostInventory, vm: VmInventory): Iterable<Refusal> {
  const { vm: name, mode } = request;
  if (vm.identityIssue !== null) {
    yield refuse(
      'IDENTITY_PENDING',
      `${name} does not have its own identity yet: ${vm.identityIssue}`,
      `wait until "vmctl show ${name}" no longer lists an identity issue; ` +
        'if it persists, stop the clone and fork again with --network isolated or none',
    );
  }
  for (const { id, served } of vm.spec.disks) {
    if (served === undefined) continue;
    yield refuse(
      'DISK_NOT_MOVABLE',
      `${name} reads disk ${id} from ${served.host}, which serves it to ${source.host} only`,
      `fork again with a clone on the host that is to have it: "vfork --image ${served.image}"`,
    );
  }
  for (const disk of vm.fleetingDisks) {
    if (vm.spec.disks.some(({ id, served }) => id === disk && served !== undefined)) continue;
    yield refuse(
      'DISK_NOT_MOVABLE',
      `disk ${disk} of ${name} is an overlay that is deleted when the clone ends on ${source.host}`,
      'fork a VM whose disks are read-only: clones share such disks and can move with them',
    );
  }
  if (MODE_TRAITS[mode].mover === 'pager') yield* checkMemory(request, source, vm);
}

function* checkMemory({ vm: name }: MigrationRequest, source: HostInventory, vm: VmInventory): Iterable<Refusal> {
  const { image, spec } = vm;
  if (image === null) return;
  if (spec.memory.backing !== 'image') {
    yield refuse('VM_FILLING', `pages of ${name} are still being copied to it`, 'wait until its fork is done');
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
      `${name} runs without the preload library, so its QEMU would send the memory itself`,
      'use --native, or fork a VM that runs with the preload library',
    );
  }
  const availableBytes = Math.min(source.memoryAvailableBytes, source.ramFileFreeBytes);
  if (!(availableBytes >= image.ownBytes)) {
    const room = `${source.host} has ${neededMib(availableBytes)}`;
    yield refuse(
      'SOURCE_MEMORY',
      `copying the pages that ${name} has written to a file takes up to ${neededMib(image.ownBytes)}; ${room}`,
      `free memory on ${source.host}`,
    );
  }
}

/** Returns why this transport cannot serve the memory of the clone, or null if it can. */
export function cloneObstacle(
  transport: Transport,
  { image, spec }: VmInventory,
  table?: TransportTable,
): Refusal | null {
  const { readsProcessMemory, title } = transportRow(transport, table);
  if (image === null || readsProcessMemory) return null;
  return refuse(
    'TRANSPORT_UNAVAILABLE',
    `${title} cannot serve the memory of ${spec.name}: the pages that a clone has written are only in its process`,
    'use --tcp',
  );
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}

/**
 * Everything that can be known to stand in a fork's way, before anything has been touched. As preflight.ts: pure, never
 * throws, all reasons at once, and a figure that is no number counts as "not enough".
 */

import { CLONES_MAX, type ForkRequest } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import type { Refusal, RefusalCode } from '../../domain/refusal.js';

export interface ForkFacts {
  readonly host: string;
  readonly inventory: ForkInventory;
  /** The job of another fork of the VM that has to end first; the inventory is then as if it had. */
  readonly waitsFor: string | null;
}

const MIB = 1024 * 1024;

export function preflightFork(request: ForkRequest, { host, inventory }: ForkFacts): Refusal[] {
  return [
    ...checkCount(request),
    ...(request.vm === null ? checkImage(request, inventory) : checkParent(request.vm, host, inventory)),
    ...(request.vm === null ? [] : checkCapture(request.vm, request, host, inventory)),
    ...checkDiscarding(request, inventory),
    ...checkNames(host, inventory),
    ...checkMemory(request, host, inventory),
  ];
}

/** Clones that fit the memory besides the image; the count that was asked for where there is enough. */
export function cloneCountThatFits(request: ForkRequest, inventory: ForkInventory): number {
  const { memoryAvailableBytes, imageBytesNeeded, cloneBytesNeeded, warmCloneCount } = inventory;
  const forClonesBytes = memoryAvailableBytes - imageBytesNeeded;
  if (!Number.isFinite(forClonesBytes) || !Number.isFinite(cloneBytesNeeded)) return 0;
  const warm = Math.min(warmCloneCount, request.cloneCount);
  const cold = cloneBytesNeeded > 0 ? Math.floor(Math.max(0, forClonesBytes) / cloneBytesNeeded) : request.cloneCount;
  // Those that wait already have what they need at their start.
  return forClonesBytes < 0 ? 0 : Math.min(request.cloneCount, warm + cold);
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}

function mib(bytes: number): string {
  return Number.isFinite(bytes) ? `${Math.max(0, Math.floor(bytes / MIB))} MiB` : 'nothing';
}

/** Asked before a host is: it could not even name so many. */
export function* checkCount({ cloneCount }: ForkRequest): Iterable<Refusal> {
  if (Number.isInteger(cloneCount) && cloneCount >= 1 && cloneCount <= CLONES_MAX) return;
  yield refuse('CLONE_COUNT', `${cloneCount} clones are not between 1 and ${CLONES_MAX}`, 'ask for fewer, or for one');
}

function* checkParent(name: string, host: string, { vm, isFilling }: ForkInventory): Iterable<Refusal> {
  if (vm.owner !== host) {
    yield refuse('VM_NOT_OWNED', `${name} belongs to ${vm.owner}, not to ${host}`, `ask the daemon on ${vm.owner}`);
  }
  if (vm.state !== 'running') {
    yield refuse(
      'VM_NOT_RUNNING',
      `${name} is ${vm.state}, not running`,
      `"vmctl resume ${name}" or "vmctl run" first`,
    );
  }
  if (vm.job !== null) {
    yield refuse('VM_IN_JOB', `${name} is part of job ${vm.job}`, `wait for it: "vmctl job ${vm.job} --follow"`);
  } else if (isFilling) {
    yield refuse(
      'VM_FILLING',
      `pages of ${name} are still on their way to it, or into an image of it`,
      'wait until they are there: "vmctl jobs", "vmctl images"',
    );
  }
}

function* checkCapture(
  name: string,
  { parentMode }: ForkRequest,
  host: string,
  inventory: ForkInventory,
): Iterable<Refusal> {
  const { vm } = inventory;
  for (const blocker of vm.migrationBlockers) {
    yield refuse(
      'DEVICE_NOT_MIGRATABLE',
      `a device of ${name} has a state that cannot be saved: ${blocker}`,
      'remove the device from the VM, or replace it by one that can migrate',
    );
  }
  if (vm.image !== null && parentMode === 'stop') {
    yield refuse(
      'RAM_NOT_SHARED',
      `${name} shares its memory with image ${vm.image.id}, so it cannot become one itself`,
      'use --parent continue: what it has of its own is copied',
    );
  } else if (!vm.isRamShared || !vm.isRamNamedFile) {
    yield refuse(
      'RAM_NOT_SHARED',
      `the RAM of ${name} is private to its QEMU, so nobody else can copy it`,
      'run the VM with memory.backing "shared"',
    );
  }
  for (const blocker of inventory.diskBlockers) {
    yield refuse('DISK_NOT_SNAPSHOTTABLE', `no snapshot of a disk of ${name} can be taken: ${blocker}`, 'detach it');
  }
  // A parent that stays stopped writes nothing that could escape.
  if (parentMode === 'stop') return;
  for (const device of inventory.escapingDevices) {
    yield refuse(
      'WRITES_ESCAPE',
      `${name} has a device that writes to its memory past write-protection: ${device}`,
      'remove the device, or use --parent stop',
    );
  }
  if (!inventory.isWriteProtectSupported) {
    yield refuse(
      'WRITE_PROTECT_MISSING',
      `the kernel of ${host} cannot write-protect shared memory through userfaultfd`,
      'use a kernel of version 5.19 or newer, or --parent stop',
    );
  }
  if (!inventory.hasPreload) {
    yield refuse(
      'PRELOAD_MISSING',
      `${name} runs without the preload library, so nobody can write-protect its memory`,
      'start it with preload, or use --parent stop',
    );
  }
}

/**
 * Whose clone gives memory back punches it out of the image, and so takes it from all. That a parent does it is found
 * as an escaping write.
 */
function* checkDiscarding({ vm: name, parentMode, memory }: ForkRequest, { vm }: ForkInventory): Iterable<Refusal> {
  if (memory !== 'cow' || (name !== null && parentMode === 'continue')) return;
  for (const device of vm.discardingDevices) {
    yield refuse(
      'WRITES_ESCAPE',
      `a clone of ${vm.spec.name} could give memory back (${device}), and with it pages of the image that all clones share`,
      'remove the device, or use --memory private',
    );
  }
}

function* checkImage({ image: id }: ForkRequest, { image }: ForkInventory): Iterable<Refusal> {
  if (image === null) {
    yield refuse('IMAGE_INCOMPLETE', `there is no image ${id ?? ''} here`, '"vmctl images" lists those that there are');
  } else if (image.state !== 'complete') {
    yield refuse(
      'IMAGE_INCOMPLETE',
      `image ${image.id} is ${image.state}, not complete`,
      image.state === 'failed' ? `"vmctl image rm ${image.id}"` : 'wait until it is: "vmctl images"',
    );
  }
}

const NAMES_SHOWN_MAX = 5;

function* checkNames(host: string, { namesTaken }: ForkInventory): Iterable<Refusal> {
  if (namesTaken.length === 0) return;
  const more = namesTaken.length > NAMES_SHOWN_MAX ? ` and ${namesTaken.length - NAMES_SHOWN_MAX} more` : '';
  yield refuse(
    'NAME_TAKEN',
    `${host} has a VM with a clone's name already: ${namesTaken.slice(0, NAMES_SHOWN_MAX).join(', ')}${more}`,
    'choose another --name, or "vmctl stop" what is not wanted',
  );
}

function* checkMemory(request: ForkRequest, host: string, inventory: ForkInventory): Iterable<Refusal> {
  const { imageBytesFree, imageBytesNeeded, cloneBytesNeeded, memoryAvailableBytes } = inventory;
  if (!(imageBytesFree >= imageBytesNeeded)) {
    yield refuse(
      'IMAGE_MEMORY',
      `the image needs ${mib(imageBytesNeeded)}; the budget for images on ${host} has ${mib(imageBytesFree)} left`,
      'remove images that nobody needs ("vmctl images", "vmctl image rm"), or raise images.budgetBytes',
    );
  }
  const count = cloneCountThatFits(request, inventory);
  if (count >= request.cloneCount || (request.isPartialAllowed && count > 0)) return;
  const neededBytes = imageBytesNeeded + request.cloneCount * cloneBytesNeeded;
  const missingBytes = neededBytes - (Number.isFinite(memoryAvailableBytes) ? memoryAvailableBytes : 0);
  yield refuse(
    'CLONE_MEMORY',
    `${request.cloneCount} clones and their image need ${mib(neededBytes)}; ${host} has ${mib(memoryAvailableBytes)}: ${Math.ceil(missingBytes / MIB)} MiB are missing, ${count} clones fit`,
    count > 0 ? `ask for ${count}, or add --partial` : `free memory on ${host}`,
  );
}

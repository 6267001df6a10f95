/**
 * Checks a fork before anything is changed. Like migration/preflight.ts, it is pure, never throws, and returns all
 * reasons at once. A figure that is not a number counts as "not enough".
 */

import { CLONES_MAX, type ForkRequest } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import { resourceClashes } from '../../domain/host-resource.js';
import type { Refusal, RefusalCode } from '../../domain/refusal.js';
import { inJob, notRunning } from '../busy.js';
import { checkLimits, checkState, vmCountWithinLimits } from '../limits.js';
import { checkMemory, checkNames } from './host-checks.js';
import type { HostsFacts } from './hosts.js';

export interface ForkFacts {
  readonly host: string;
  readonly inventory: ForkInventory;
  /** Job of another fork of the VM that must end first. The inventory is then taken as if that job had ended. */
  readonly waitsFor: string | null;
  /** Set if the request names hosts. */
  readonly hosts?: HostsFacts;
  /** The job that holds the VM can still be cancelled. Absent: it cannot. */
  readonly isJobCancellable?: boolean;
}

export function preflightFork(request: ForkRequest, facts: ForkFacts): Refusal[] {
  const { host, inventory } = facts;
  return [
    ...checkCount(request),
    ...(request.vm === null ? checkImage(request, inventory) : checkParent(request.vm, facts)),
    ...(request.vm === null ? [] : checkCapture(request.vm, request, host, inventory)),
    ...checkDiscarding(request, inventory),
    ...checkHostResources(request, inventory),
    ...checkPrefix(request),
    ...checkNames(host, inventory),
    // Those of a fork over hosts depend on the placement (hosts.ts).
    ...(facts.hosts === undefined ? checkMemory(request, host, inventory) : []),
    ...(facts.hosts === undefined ? checkRoomForClones(request, host, inventory) : []),
    ...checkState(host, inventory.stateFreeBytes),
  ];
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}

/** This check runs before a host is asked, because the host could not name that many clones. */
export function* checkCount({ cloneCount, image, hosts }: ForkRequest): Iterable<Refusal> {
  // An image can be brought to other hosts without clones.
  const min = image !== null && hosts !== undefined ? 0 : 1;
  if (Number.isInteger(cloneCount) && cloneCount >= min && cloneCount <= CLONES_MAX) return;
  yield refuse('CLONE_COUNT', `clone count must be ${min}-${CLONES_MAX}, not ${cloneCount}`, 'change --clones');
}

function* checkParent(name: string, { host, inventory, isJobCancellable = false }: ForkFacts): Iterable<Refusal> {
  const { vm, isFilling } = inventory;
  if (vm.owner !== host) {
    yield refuse('VM_NOT_OWNED', `${name} belongs to ${vm.owner}, not to ${host}`, `ask the daemon on ${vm.owner}`);
  }
  const stopped = notRunning(name, vm);
  if (stopped !== null) yield stopped;
  const busy = inJob(name, vm, isJobCancellable);
  if (busy !== null) {
    yield busy;
  } else if (isFilling) {
    yield refuse(
      'VM_FILLING',
      `pages of ${name} are still being transferred to it, or copied into an image of it`,
      'wait until that job or image is complete: "vmctl jobs", "vmctl images"',
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
      `the state of a device of ${name} cannot be saved: ${blocker}`,
      'remove the device from the VM, or replace it by a device that can migrate',
    );
  }
  for (const change of vm.deviceChanges ?? []) {
    yield refuse(
      'DEVICE_CHANGED',
      `the devices of ${name} are not those of its spec, from which clones are made: ${change}`,
      "undo the change on the VM's monitor socket (device_del, device_add), or stop the VM and change its spec",
    );
  }
  if (vm.image !== null && parentMode === 'stop') {
    yield refuse(
      'RAM_NOT_SHARED',
      `${name} shares its memory with image ${vm.image.id}, so it cannot become one itself`,
      'use --parent continue, which copies the pages that it has written',
    );
  } else if (!vm.isRamShared || !vm.isRamNamedFile) {
    yield refuse(
      'RAM_NOT_SHARED',
      `the RAM of ${name} is private to its QEMU, so no other process can copy it`,
      'run the VM with memory.backing "shared"',
    );
  }
  for (const blocker of inventory.diskBlockers) {
    yield refuse(
      'DISK_NOT_SNAPSHOTTABLE',
      `a disk of ${name} does not support snapshots: ${blocker}`,
      vm.image === null
        ? 'start the VM with that disk in the disks of its spec, or with the drive read-only'
        : `start more clones of its image: "vfork --image ${vm.image.id}"`,
    );
  }
  for (const chain of inventory.longChains ?? []) {
    yield refuse('DISK_CHAIN_LONG', `${chain}, and a fork adds one`, `merge them: "vmctl flatten ${name}"`);
  }
  // A parent that stays stopped does not write, so it needs no write protection. A clone cannot become an image.
  if (parentMode === 'stop') return;
  const orStop = (remedy: string): string => (vm.image === null ? `${remedy}, or use --parent stop` : remedy);
  for (const device of inventory.escapingDevices) {
    yield refuse(
      'WRITES_ESCAPE',
      `a device of ${name} writes to memory in spite of write protection: ${device}`,
      orStop('remove the device'),
    );
  }
  if (!inventory.isWriteProtectSupported) {
    yield refuse(
      'WRITE_PROTECT_MISSING',
      `the kernel of ${host} cannot write-protect shared memory through userfaultfd`,
      orStop('use a kernel of version 5.19 or newer'),
    );
  }
  if (!inventory.hasPreload) {
    yield refuse(
      'PRELOAD_MISSING',
      `${name} runs without the preload library, so its memory cannot be write-protected`,
      orStop('run the VM with preload: true'),
    );
  }
}

/**
 * A clone that gives memory back (balloon) punches a hole into the image, which takes those pages from all clones. A
 * parent that does so is refused as an escaping write.
 */
function* checkDiscarding({ vm: name, parentMode, memory }: ForkRequest, { vm }: ForkInventory): Iterable<Refusal> {
  if (memory !== 'cow' || (name !== null && parentMode === 'continue')) return;
  for (const device of vm.discardingDevices) {
    yield refuse(
      'WRITES_ESCAPE',
      `a clone of ${vm.spec.name} could free memory (${device}), which would remove pages of the image for all clones`,
      'remove the device, or use --memory private',
    );
  }
}

function* checkHostResources(
  { vm: parent, network, cloneCount }: ForkRequest,
  { vm, hostResources }: ForkInventory,
): Iterable<Refusal> {
  // A single clone of an image may have what its parent had.
  if (parent === null && cloneCount === 1) return;
  yield* resourceClashes(vm.spec, network, hostResources ?? []);
}

function* checkImage({ image: id }: ForkRequest, { image, diskProblem }: ForkInventory): Iterable<Refusal> {
  if (diskProblem !== undefined && diskProblem !== null && image?.state === 'complete') {
    yield refuse(
      diskProblem.code,
      diskProblem.reason,
      diskProblem.code === 'DISK_IN_USE'
        ? 'end the VM or the program that has the disk open'
        : `put the disk's files back as they were, or remove the image: "vmctl image rm ${image.id}"`,
    );
  }
  if (image === null) {
    yield refuse('IMAGE_INCOMPLETE', `no image ${id ?? ''} on this host`, 'list the images with "vmctl images"');
  } else if (image.state !== 'complete') {
    yield refuse(
      'IMAGE_INCOMPLETE',
      `image ${image.id} is ${image.state}, not complete`,
      image.state === 'failed'
        ? `remove it: "vmctl image rm ${image.id}"`
        : image.state === 'unloaded'
          ? 'load it from its file: "vmctl image load FILE"'
          : 'wait until it is complete: "vmctl images"',
    );
  }
}

/** Waiting processes hold their descriptors and tasks already. */
function* checkRoomForClones(request: ForkRequest, host: string, inventory: ForkInventory): Iterable<Refusal> {
  const need = {
    vmCount: Math.max(0, request.cloneCount - inventory.warmCloneCount),
    cpus: inventory.vm.spec.cpus,
  };
  const count = vmCountWithinLimits(inventory.limits, need) + inventory.warmCloneCount;
  if (request.isPartialAllowed && count > 0) return;
  for (const refusal of checkLimits(host, inventory.limits, need)) {
    yield count > 0 ? { ...refusal, remedy: `use --clones ${count}, or ${refusal.remedy}` } : refusal;
  }
}

/** The rule of VM specs: a clone is a VM. */
const NAME_START = /^[a-z0-9][a-z0-9-]*$/;

function* checkPrefix({ namePrefix }: ForkRequest): Iterable<Refusal> {
  if (namePrefix === null || NAME_START.test(namePrefix)) return;
  yield refuse(
    'CLONE_NAME',
    `clones cannot be named after "${namePrefix}": names have lower-case letters, digits and "-"`,
    'choose another --name',
  );
}

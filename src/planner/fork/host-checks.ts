/** Checks of a host that is to make clones: its names and its memory. Pure. */
import type { ForkRequest } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import type { Refusal, RefusalCode } from '../../domain/refusal.js';
import { availableMib, neededMib } from '../bytes.js';
import { cloneCountInBudget, cloneCountThatFits } from './clone-room.js';

const NAMES_SHOWN_MAX = 5;

export function* checkNames(
  host: string,
  { namesTaken, namesOfEnded = [], namesElsewhere = [] }: ForkInventory,
): Iterable<Refusal> {
  const some = (names: readonly string[]) => {
    const more = names.length > NAMES_SHOWN_MAX ? ` and ${names.length - NAMES_SHOWN_MAX} more` : '';
    return `${names.slice(0, NAMES_SHOWN_MAX).join(', ')}${more}`;
  };
  if (namesTaken.length > 0) {
    yield refuse(
      'NAME_TAKEN',
      `names of the clones are already used on ${host}: ${some(namesTaken)}`,
      'choose another --name, or end those VMs with "vmctl stop"',
    );
  }
  if (namesElsewhere.length > 0) {
    yield refuse(
      'NAME_TAKEN',
      `names of the clones are already used on other hosts: ${some(namesElsewhere)}`,
      'choose another --name, or end those VMs with "vmctl stop" on their hosts',
    );
  }
  if (namesOfEnded.length > 0) {
    yield refuse(
      'NAME_TAKEN',
      `ended VMs on ${host} have names of the clones, with exit codes and logs: ${some(namesOfEnded)}`,
      'choose another --name, remove those VMs with "vmctl stop", or add --replace',
    );
  }
}

export function* checkMemory(request: ForkRequest, host: string, inventory: ForkInventory): Iterable<Refusal> {
  const { imageBytesFree, imageBytesNeeded, cloneBytesNeeded, memoryAvailableBytes } = inventory;
  if (!(imageBytesFree >= imageBytesNeeded)) {
    yield refuse(
      'IMAGE_MEMORY',
      `the image needs ${neededMib(imageBytesNeeded)}; ` +
        `the budget for images on ${host} has ${availableMib(imageBytesFree)} left`,
      'remove unused images ("vmctl images", "vmctl image rm"), or raise images.budgetBytes',
    );
  }
  const count = cloneCountThatFits(request, inventory);
  if (count >= request.cloneCount || (request.isPartialAllowed && count > 0)) return;
  const inBudget = cloneCountInBudget(request, inventory) + Math.min(inventory.warmCloneCount, request.cloneCount);
  if (inBudget < request.cloneCount && inBudget === count) {
    const size = neededMib(inventory.vm.spec.memory.sizeBytes);
    yield refuse(
      'CLONE_MEMORY',
      `each clone may write ${size}; the budget for clones on ${host} allows ${count} more clones`,
      'end clones ("vmctl stop"), or raise clones.budget or clones.overcommit in the configuration of vmigrated',
    );
    return;
  }
  const neededBytes = imageBytesNeeded + request.cloneCount * cloneBytesNeeded;
  const missingBytes = neededBytes - (Number.isFinite(memoryAvailableBytes) ? memoryAvailableBytes : 0);
  const need = `${request.cloneCount} clones and their image need ${neededMib(neededBytes)}`;
  const room = `${host} has ${availableMib(memoryAvailableBytes)}, ${neededMib(missingBytes)} too little`;
  yield refuse(
    'CLONE_MEMORY',
    `${need}; ${room}; ${count} clones fit`,
    count > 0 ? `use --clones ${count}, or add --partial` : `free memory on ${host}`,
  );
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}

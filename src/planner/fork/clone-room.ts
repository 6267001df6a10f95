/** How many clones the memory of a host has room for. Pure. */
import type { ForkRequest } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';

/** Returns how many clones fit into memory besides the image, at most the number requested. */
export function cloneCountThatFits(request: ForkRequest, inventory: ForkInventory): number {
  const { memoryAvailableBytes, imageBytesNeeded, cloneBytesNeeded, warmCloneCount } = inventory;
  const forClonesBytes = memoryAvailableBytes - imageBytesNeeded;
  if (!Number.isFinite(forClonesBytes) || !Number.isFinite(cloneBytesNeeded)) return 0;
  const warm = Math.min(warmCloneCount, request.cloneCount);
  const cold = cloneBytesNeeded > 0 ? Math.floor(Math.max(0, forClonesBytes) / cloneBytesNeeded) : request.cloneCount;
  const inBudget = cloneCountInBudget(request, inventory);
  // Waiting processes already hold the memory that a clone needs at its start.
  return forClonesBytes < 0 ? 0 : Math.min(request.cloneCount, warm + Math.min(cold, inBudget));
}

/** Returns how many more clones the clones' budget allows. Waiting processes count already. */
export function cloneCountInBudget({ memory }: ForkRequest, { vm, cloneBytesFree }: ForkInventory): number {
  if (memory !== 'cow' || cloneBytesFree === undefined) return Infinity;
  return Math.floor(cloneBytesFree / vm.spec.memory.sizeBytes);
}

import type { ForkInventory } from '../../domain/host.js';
import type { ForkOrigin } from '../ports/fork.js';

/** Stands for the id of an image that a fork has not made yet. No image has it. */
export const IMAGE_TO_COME = '0'.repeat(16);

/** Describes the image to a host that is to join. `inventory` is that of `host`, which has the image or takes it. */
export function originOf(host: string, inventory: ForkInventory, image: string): ForkOrigin {
  const { vm, image: existing, imageBytesNeeded } = inventory;
  const { spec, accel, qemuVersion } = vm;
  // With --parent stop the root needs no memory for the image, because the parent's files become it.
  const capturedBytes = imageBytesNeeded > 0 ? imageBytesNeeded : vm.ramAllocatedBytes;
  const allocatedBytes = Math.min(existing?.allocatedBytes ?? capturedBytes, spec.memory.sizeBytes);
  return { host, image, spec, accel, qemuVersion, allocatedBytes };
}

/** The target's half of the commit: its own owner record, without which it never runs the VM. */
import { MigrationError } from '../../domain/errors.js';
import type { OwnerRecord, Registry } from '../../engine/ports/registry.js';

/**
 * Makes `next` the owner record of this host. This is the one durable write between the commit and the guest's first
 * instruction. `epochBefore` is the epoch of the record that this host had when the session began; null: it had none.
 * A repeated call finds its own record. Throws OWNER_CHANGED if the host knows an owner that is as new.
 */
export async function takeOwnership(registry: Registry, next: OwnerRecord, epochBefore: number | null): Promise<void> {
  const { vm, owner: host, epoch, session } = next;
  const isTaken = async () => {
    const owner = await registry.owner(vm);
    return owner?.owner === host && owner.session === session && owner.epoch === epoch;
  };
  if (epochBefore !== null && epochBefore >= epoch) {
    if (await isTaken()) return;
    throw new MigrationError(
      'OWNER_CHANGED',
      `${vm} has epoch ${epochBefore} on this host; epoch ${epoch} is not newer`,
    );
  }
  await registry.swapOwner(vm, epochBefore, next).catch(async (error: unknown) => {
    if (!(await isTaken())) throw error;
  });
}

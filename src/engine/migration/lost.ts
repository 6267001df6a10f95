/** What it means that the VM's QEMU has ended on the target: the guest has ended, or the VM is lost. */
import { MigrationError } from '../../domain/errors.js';
import { type GuestEnd, isGuestEnd } from '../../domain/guest-end.js';
import type { SessionProgress } from '../ports/session.js';
import type { StepContext } from './context.js';

/**
 * Returns how the guest has ended by itself on the target, or null. Such a guest needs no more pages, so its move is
 * done. A guest that has not run there cannot have ended by itself.
 */
export function guestEndOf({ state, hasRun, ended }: SessionProgress): GuestEnd | null {
  return state === 'gone' && hasRun && ended !== undefined && isGuestEnd(ended.reason) ? ended : null;
}

/** Builds the error for a target QEMU that has ended with pages of the guest, or all of it. `cause` is the evidence. */
export function lost({ record }: StepContext, hasRun: boolean, cause: MigrationError | undefined): MigrationError {
  const { vm, target } = record.plan.request;
  const { source } = record.plan;
  return hasRun
    ? new MigrationError('VM_LOST', `QEMU of ${vm} has ended on ${target} after the VM had run there`, {
        remedy: `${source} keeps the memory of the switchover, frozen, until "vmctl stop ${vm}" is run there`,
        cause,
      })
    : new MigrationError('VM_LOST', `QEMU of ${vm} has ended on ${target} after the commit, before the VM ran there`, {
        remedy: `${source} keeps the VM's memory, complete and unchanged, until "vmctl stop ${vm}" is run there`,
        cause,
      });
}

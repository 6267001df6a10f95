/** What it means that the VM's QEMU has ended on the target: the guest has ended, or the VM is lost. */
import { MigrationError } from '../../domain/errors.js';
import { type GuestEnd, isGuestEnd } from '../../domain/guest-end.js';
import type { SessionProgress } from '../ports/session.js';
import type { StepContext } from './context.js';

/** The reason of an end that a user has forced, in the details of the target's error. */
const FORCED = 'stopped';

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
  if (cause !== undefined && wasForced(cause)) {
    return new MigrationError('VM_LOST', `${vm} was stopped by force on ${target} before all of its memory was there`, {
      remedy: `${source} has freed its part; if "vmctl ps" there still lists ${vm}: "vmctl stop ${vm}"`,
      details: cause.details,
      cause,
    });
  }
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

/** Returns whether a user has ended the VM by force on the target. */
export function wasForced({ details }: MigrationError): boolean {
  return (details as { reason?: unknown } | null | undefined)?.reason === FORCED;
}

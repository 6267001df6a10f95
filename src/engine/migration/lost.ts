import { MigrationError } from '../../domain/errors.js';
import type { StepContext } from './context.js';

/** The target's QEMU has ended with pages, or all of the guest, in it; `cause` is how we know. */
export function lost({ record }: StepContext, hasRun: boolean, cause: MigrationError | undefined): MigrationError {
  const { vm, target } = record.plan.request;
  const { source } = record.plan;
  return hasRun
    ? new MigrationError('VM_LOST', `QEMU of ${vm} has ended on ${target} after the VM had run there`, {
        remedy: `${source} keeps the memory as it was at the switchover, frozen, until "vmctl stop ${vm}" there`,
        cause,
      })
    : new MigrationError('VM_LOST', `QEMU of ${vm} has ended on ${target} after the commit and before it ran there`, {
        remedy: `${source} keeps the stopped VM's memory, complete and unchanged, until "vmctl stop ${vm}" there`,
        cause,
      });
}

import { MigrationError } from '../../domain/errors.js';
import type { StepContext } from './context.js';

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

/** What the target of a move knows of a VM that has ended there. */
import type { GuestEnd } from '../../domain/guest-end.js';
import type { VmExit } from '../../domain/vm.js';
import type { VmManager } from '../vm/vms.js';

export function endedOf(exit: VmExit | null): { ended?: GuestEnd } {
  return exit === null ? {} : { ended: { reason: exit.reason, exitCode: exit.exitCode } };
}

/**
 * Records the exit code that the guest had written before it moved here, also if the VM has ended. A code that the
 * guest has written here is newer and stays. Durable when it resolves.
 */
export function inheritExitCode(vms: VmManager, name: string, exitCode: number): Promise<void> {
  return vms.amend(name, ({ exitCodeBefore, exit }) => {
    if (exitCodeBefore !== null) return {};
    return { exitCodeBefore: exitCode, ...(exit === null ? {} : { exit: { ...exit, exitCode } }) };
  });
}

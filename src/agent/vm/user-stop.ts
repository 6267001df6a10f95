/** What `vmctl stop` does: the power button, then the end of QEMU, then the removal of what is left of the VM. */
import type { StopResult } from '../../domain/vm.js';
import type { VmManager } from './vms.js';

export interface UserStop {
  /** Kill QEMU at once, even if a job holds the VM. */
  readonly isForced: boolean;
  /** How long the guest may take to shut down. 0: its power button is not pressed. */
  readonly gracefulMs: number;
  /** No session and no fork needs the VM, so that force ends it in any state. */
  readonly isUnclaimed?: boolean;
}

/**
 * The first stop of a VM ends QEMU and keeps the logs; the second one forgets the VM. A user who stops a VM means both.
 * A VM that has ended by itself stays listed until a user stops it. Throws VM_BUSY if a job holds the VM.
 */
export async function stopForUser(vms: VmManager, name: string, options: UserStop): Promise<StopResult> {
  const { isForced, gracefulMs, isUnclaimed = false } = options;
  const vm = vms.get(name);
  const isOver = vm.state === 'stopped' || vm.state === 'departed';
  const isAsked = !isForced && !isOver && vm.state === 'running' && gracefulMs > 0;
  const hasShutDown = isAsked && (await vms.shutDown(name, gracefulMs));
  // Another stop may have removed the VM meanwhile, and its name may be used again.
  const isThere = () => vms.has(name) && vms.get(name) === vm;
  if (isThere() && vms.exitOf(name) === null && !isOver) await vms.stop(name, { isForced, isUnclaimed });
  const exitCode = isThere() ? (vms.exitOf(name)?.exitCode ?? null) : null;
  if (isThere()) await vms.stop(name, { isForced, isUnclaimed });
  if (isOver) return { name, how: 'removed', exitCode };
  if (isForced) return { name, how: 'killed', exitCode };
  return { name, how: hasShutDown ? 'shutDown' : isAsked ? 'noReaction' : 'ended', exitCode };
}

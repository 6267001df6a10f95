/** What `vmctl stop` does: the power button, then the end of QEMU, then the removal of what is left of the VM. */
import { type ErrorCode, toMigrationError } from '../../domain/errors.js';
import { isPanic } from '../../domain/guest-end.js';
import type { StopResult, StopWay } from '../../domain/vm.js';
import type { ManagedVm, VmManager } from './vms.js';

const DEAF: ReadonlySet<ErrorCode> = new Set(['QEMU_GONE', 'QEMU_FAILED', 'TIMEOUT']);

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
 * A VM that has ended by itself stays listed until a user stops it. Much may happen while the guest is waited for:
 * another stop, another end, even a new VM of the same name, which is left alone. Throws VM_BUSY if a job holds the VM.
 */
export async function stopForUser(vms: VmManager, name: string, options: UserStop): Promise<StopResult> {
  const { isForced, gracefulMs, isUnclaimed = false } = options;
  const vm = vms.get(name);
  const order = { isForced, isUnclaimed, only: vm };
  const isOver = vm.state === 'stopped' || vm.state === 'departed';
  const isAsked = !isForced && vm.state === 'running' && gracefulMs > 0;
  if (isAsked) await vms.shutDown(name, gracefulMs).catch(unlessDeaf);
  const hasEnded = vm.exit !== null || !isThere(vms, vm);
  if (!hasEnded && !isOver) await vms.stop(name, order);
  if (isThere(vms, vm)) await vms.stop(name, order);
  const { exit } = vm;
  return {
    name,
    how: wayOf(vm, { isOver, isForced, isAsked, hasEnded }),
    exitCode: exit?.exitCode ?? null,
    reason: exit?.reason ?? null,
  };
}

/** A QEMU that cannot even be asked is ended like a guest that does not react. */
function unlessDeaf(thrown: unknown): void {
  const error = toMigrationError(thrown);
  if (!DEAF.has(error.code)) throw error;
}

function isThere(vms: VmManager, vm: ManagedVm): boolean {
  return vms.has(vm.spec.name) && vms.get(vm.spec.name) === vm;
}

interface Course {
  readonly isOver: boolean;
  readonly isForced: boolean;
  /** The power button has been pressed. */
  readonly isAsked: boolean;
  /** The VM had ended before this stop ended it. */
  readonly hasEnded: boolean;
}

function wayOf({ guestEnd }: ManagedVm, { isOver, isForced, isAsked, hasEnded }: Course): StopWay {
  if (isOver) return 'removed';
  if (isForced) return 'killed';
  if (!hasEnded) return isAsked ? 'noReaction' : 'ended';
  return isAsked && guestEnd !== null && !isPanic(guestEnd.reason) ? 'shutDown' : 'endedMeanwhile';
}

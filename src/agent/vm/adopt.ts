/** Reattaches this daemon to a VM that an earlier daemon has left running. */
import { setTimeout as sleep } from 'node:timers/promises';
import { toMigrationError } from '../../domain/errors.js';
import type { Log } from '../../kit/log.js';
import { isAlive, type ProcessIdentity } from '../../kit/process.js';
import type { NativeBinding } from '../../native/types.js';
import type { VmKeeper } from './keeper.js';
import { restorePriority } from './priority.js';
import type { Vm } from './vm.js';

/**
 * A QEMU whose main loop waits for a missing page does not answer until its session serves faults. Sessions start only
 * after all VMs have been adopted, so the wait is bounded.
 */
const ANSWER_WAIT_MS = 500;

export interface AdoptOptions {
  readonly keeper: VmKeeper;
  readonly native: NativeBinding | null;
  readonly log: Log;
}

/** Returns `unwanted` if the VM's start was never reported to a user. The caller then removes the VM. */
export async function adopt(vm: Vm, options: AdoptOptions): Promise<'kept' | 'unwanted'> {
  const { state } = vm.record;
  const isStart = state === 'starting' || state === 'incoming';
  // A crash may have come between starting QEMU and recording its pid. Such a VM has never run.
  if (isStart && vm.record.process === null) await options.keeper.endUnrecorded(vm);
  if (state === 'starting') return 'unwanted';
  const process = await findProcess(vm, options.log);
  if (process === null) {
    if (vm.record.exit === null) await options.keeper.settle(vm, 'vanished');
    return 'kept';
  }
  const { record } = vm;
  // If the earlier daemon ended in the middle of a fork, the clones still have a raised priority.
  restorePriority(process.pid);
  if (record.memory !== null && options.native !== null) {
    try {
      vm.memory = options.native.adoptVm({ snapshot: record.memory, regions: record.regions });
    } catch (error) {
      const fields = { vm: vm.spec.name, error: toMigrationError(error).toJSON() };
      options.log.error(fields, "the VM's userfaultfd descriptors cannot be taken over");
    }
  }
  await Promise.race([options.keeper.reconnect(vm), sleep(ANSWER_WAIT_MS)]);
  return 'kept';
}

/**
 * Returns the VM's QEMU, or null if there is none. The record may be wrong, for example because it comes from a backup.
 * Nothing of a VM is deleted before QEMU itself has been looked for, by the socket on its command line.
 */
async function findProcess(vm: Vm, log: Log): Promise<ProcessIdentity | null> {
  const { process: recorded, state } = vm.record;
  if (recorded !== null && (await isAlive(recorded))) return recorded;
  const [found] = await vm.findStray();
  if (found === undefined) return null;
  log.error({ vm: vm.spec.name, recorded, found }, "the VM's process is another one than its record says: it is kept");
  await vm.update({ process: found, exit: null, ...(state === 'stopped' ? { state: 'paused' as const } : {}) });
  return found;
}

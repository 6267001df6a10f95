/** Reattaches this daemon to a VM that an earlier daemon has left running. */
import { setTimeout as sleep } from 'node:timers/promises';
import { toMigrationError } from '../../domain/errors.js';
import type { Log } from '../../kit/log.js';
import { isAlive } from '../../kit/process.js';
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
  const { record } = vm;
  if (record.process === null) await options.keeper.endUnrecorded(vm);
  if (record.state === 'starting') return 'unwanted';
  if (record.state === 'stopped') return 'kept';
  if (record.process === null || !(await isAlive(record.process))) {
    if (record.exit === null) await options.keeper.settle(vm, 'vanished');
    return 'kept';
  }
  // If the earlier daemon ended in the middle of a fork, the clones still have a raised priority.
  restorePriority(record.process.pid);
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

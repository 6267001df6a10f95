/** Takes up a VM that an earlier daemon has left behind. */
import { setTimeout as sleep } from 'node:timers/promises';
import { toMigrationError } from '../../domain/errors.js';
import type { Log } from '../../kit/log.js';
import { isAlive } from '../../kit/process.js';
import type { NativeBinding } from '../../native/types.js';
import type { VmKeeper } from './keeper.js';
import { unhasten } from './priority.js';
import type { Vm } from './vm.js';

/**
 * A QEMU whose main loop waits for a missing page answers only once its session serves faults, which comes after all
 * VMs have been taken up.
 */
const ANSWER_WAIT_MS = 500;

export interface AdoptOptions {
  readonly keeper: VmKeeper;
  readonly native: NativeBinding | null;
  readonly log: Log;
}

/** `unwanted`: the caller removes it, nobody was ever told that it runs. */
export async function adopt(vm: Vm, options: AdoptOptions): Promise<'kept' | 'unwanted'> {
  const { record } = vm;
  if (record.process === null) await options.keeper.endUnrecorded(vm);
  if (record.state === 'starting') return 'unwanted';
  if (record.state === 'stopped') return 'kept';
  if (record.process === null || !(await isAlive(record.process))) {
    if (record.exit === null) await options.keeper.settle(vm, 'vanished');
    return 'kept';
  }
  // A daemon that ended in the middle of a fork has left its clones ahead of others.
  unhasten(record.process.pid);
  if (record.memory !== null && options.native !== null) {
    try {
      vm.memory = options.native.adoptVm({ snapshot: record.memory, regions: record.regions });
    } catch (error) {
      const fields = { vm: vm.spec.name, error: toMigrationError(error).toJSON() };
      options.log.error(fields, 'the memory of a VM cannot be taken over');
    }
  }
  await Promise.race([options.keeper.takeUp(vm), sleep(ANSWER_WAIT_MS)]);
  return 'kept';
}

/** The QEMU of a VM that a restarted daemon has found and may not have reached yet. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { QmpClient } from '../../backends/qemu/qmp.js';

const ANSWER_TIMEOUT_MS = 10_000;
const ANSWER_POLL_MS = 20;

/** Of a ManagedVm: both throw while they are not known. */
export interface ConnectingVm {
  readonly qmp: QmpClient;
  readonly pid: number;
}

/**
 * VmManager connects to the QEMU of an earlier daemon when it answers. QEMU_GONE if it does not in time, or has ended.
 */
export async function connectedQmp(vm: ConnectingVm): Promise<QmpClient> {
  const deadlineMs = performance.now() + ANSWER_TIMEOUT_MS;
  for (;;) {
    try {
      return vm.qmp;
    } catch (error) {
      if (hasEnded(vm) || performance.now() > deadlineMs) throw error;
    }
    await sleep(ANSWER_POLL_MS);
  }
}

/** Then it has no process to tell the number of. */
function hasEnded(vm: ConnectingVm): boolean {
  try {
    return vm.pid === 0;
  } catch {
    return true;
  }
}

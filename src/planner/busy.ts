/** Refusals of a VM that another job holds, or that does not run: what a person can do depends on how that is. */
import type { VmInventory } from '../domain/host.js';
import type { Refusal } from '../domain/refusal.js';
import type { VmState } from '../domain/vm.js';

/**
 * Returns the refusal of a VM that is in a job, or null. `isCancellable`: a cancel would be accepted now, because
 * nothing of that job is committed.
 */
export function inJob(name: string, { job, arrivingFrom }: VmInventory, isCancellable: boolean): Refusal | null {
  if (job === null) return null;
  const wait = `wait until it has ended: "vmctl job ${job} --follow"`;
  if (arrivingFrom !== undefined) {
    const reason = `memory of ${name} is still arriving from ${arrivingFrom} (job ${job})`;
    return { code: 'VM_IN_JOB', reason, remedy: wait };
  }
  const remedy = isCancellable ? `${wait}, or cancel it: "vmctl cancel ${job}"` : wait;
  return { code: 'VM_IN_JOB', reason: `${name} is part of job ${job}`, remedy };
}

const REMEDY_OF_STATE: { readonly [S in Exclude<VmState, 'running'>]: (name: string) => string } = {
  starting: () => 'wait until it runs: "vmctl ps"',
  paused: (name) => `let it run: "vmctl resume ${name}"`,
  incoming: () => 'wait until its move to this host is done: "vmctl jobs"',
  departed: (name) => `it has left this host: "vmctl show ${name}" says more`,
  stopped: () => 'start it again: "vmctl run"',
  unreadable: () => 'mend its record with the daemon stopped: "vmctl state check"',
};

/** Returns the refusal of a VM that does not run, or null. */
export function notRunning(name: string, { state }: VmInventory): Refusal | null {
  if (state === 'running') return null;
  const remedy = REMEDY_OF_STATE[state](name);
  return { code: 'VM_NOT_RUNNING', reason: `${name} is ${state}, not running`, remedy };
}

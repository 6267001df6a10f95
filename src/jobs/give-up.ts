/** When a committed migration may be given up on its source, and what it then says. */
import { MigrationError } from '../domain/errors.js';
import type { MigrationJobView } from '../domain/job.js';
import type { History } from './history.js';

/** Returns whether the target has everything, so that giving up would lose nothing and free nothing early. */
export function hasArrived({ ended, record }: History): boolean {
  return ended.has('drain') || !record.plan.steps.some(({ name }) => name === 'drain');
}

export function stillNeeded({ id, vm, source }: MigrationJobView): MigrationError {
  return new MigrationError('CONFLICT', `job ${id} still needs ${vm} on ${source}, and ends by itself`, {
    remedy: `wait until it has ended: "vmctl job ${id} --follow"`,
  });
}

export function givenUp({ vm, source, target }: MigrationJobView): MigrationError {
  return new MigrationError(
    'VM_LOST',
    `${vm} was given up by force on ${source} before ${target} had all of its memory`,
    { remedy: `${vm} waits on ${target} for pages that never come: "vmctl stop --force ${vm}" there` },
  );
}

/**
 * Turns waiting processes into running clones. First every clone loads the state, then all are resumed. So no guest
 * takes the processor from clones that still load, and no clone has run if one of them fails to load. A clone costs two
 * commands and two events. Nothing is polled, and nothing is written to disk.
 */
import type { FileLoad } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { CloneFailure } from '../../domain/fork.js';
import { inParallel } from '../../kit/parallel.js';
import { raisePriority, restorePriority } from '../vm/priority.js';
import type { ManagedVm } from '../vm/vms.js';
import type { WaitingClone } from './waiting-set.js';

/** A load is bound by the processor and takes some milliseconds. */
const LOADS_AT_ONCE = 8;

export interface RunningClone extends WaitingClone {
  /** performance.now() of its RESUME. */
  readonly resumedAtMs: number;
}

export interface StartOutcome {
  readonly running: readonly RunningClone[];
  readonly failures: readonly CloneFailure[];
}

/** With `isPartialAllowed`, clones that fail to load are left out. Otherwise no clone runs if one fails to load. */
export async function startLoaded(
  clones: readonly WaitingClone[],
  options: { isPartialAllowed: boolean },
): Promise<StartOutcome> {
  const failures: CloneFailure[] = [];
  const begun: FileLoad[] = [];
  const settle = <T>(these: readonly WaitingClone[], outcomes: readonly ({ value: T } | { error: unknown })[]) =>
    these.flatMap((clone, position) => {
      const outcome = outcomes[position];
      if (outcome !== undefined && 'value' in outcome) return [{ clone, value: outcome.value }];
      const { index, name } = clone.identity;
      failures.push({ index, name, error: outcome?.error });
      return [];
    });
  try {
    const loads = await inParallel(clones, LOADS_AT_ONCE, async (clone) => {
      if (failures.length > 0 && !options.isPartialAllowed) throw otherCloneFailed();
      const load = clone.vm.process.loadFile();
      begun.push(load);
      await waitUntilLoaded(clone.vm, load);
      return load;
    });
    const ready = settle(clones, loads);
    if (failures.length > 0 && !options.isPartialAllowed) return { running: [], failures };
    const runs = await inParallel(ready, ready.length, async ({ clone, value: load }) => {
      await resume(clone.vm, load);
      return performance.now();
    });
    const running = settle(
      ready.map(({ clone }) => clone),
      runs,
    );
    return { running: running.map(({ clone, value }) => ({ ...clone, resumedAtMs: value })), failures };
  } finally {
    for (const load of begun) load.end();
  }
}

async function waitUntilLoaded(vm: ManagedVm, load: FileLoad): Promise<void> {
  try {
    raisePriority(vm.pid);
    await load.loaded();
  } catch (error) {
    throw await vm.process.explain(error);
  }
}

async function resume(vm: ManagedVm, load: FileLoad): Promise<void> {
  try {
    await load.run();
    restorePriority(vm.pid);
  } catch (error) {
    throw await vm.process.explain(error);
  }
}

function otherCloneFailed(): MigrationError {
  return new MigrationError('CANCELLED', 'another clone of the fork has failed');
}

/**
 * From waiting QEMUs to running clones: first every one loads the state, then all are let go, so that no guest takes
 * the processor from those still loading, and none has run if one cannot. A clone costs two commands and two events;
 * nothing is polled, nothing is written to disk.
 */
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationWatch } from '../../backends/qemu/migration-watch.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneFailure } from '../../domain/fork.js';
import { inParallel } from '../../kit/parallel.js';
import { outputTail } from '../../kit/process.js';
import { hasten, unhasten } from '../vm/priority.js';
import type { ManagedVm } from '../vm/vms.js';
import type { WaitingClone } from './waiting-set.js';

/** What clones find open (vm-options.ts, `statePath`). */
const STATE_URI = 'fd:3';
/** Loading is work for the processor, some milliseconds each. */
const LOADS_AT_ONCE = 8;
const LOAD_TIMEOUT_MS = 60_000;
const RESUME_TIMEOUT_MS = 30_000;
/** A QEMU that ends closes its connection before its last words are all written. */
const LAST_WORDS_MS = 100;

export interface RunningClone extends WaitingClone {
  /** performance.now() of its RESUME. */
  readonly resumedAtMs: number;
}

export interface StartOutcome {
  readonly running: readonly RunningClone[];
  readonly failures: readonly CloneFailure[];
}

/** `isPartialAllowed`: those that do not load are left behind; otherwise none runs when one does not. */
export async function startLoaded(
  clones: readonly WaitingClone[],
  options: { isPartialAllowed: boolean },
): Promise<StartOutcome> {
  const failures: CloneFailure[] = [];
  const watches = new Map<WaitingClone, MigrationWatch>();
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
      if (failures.length > 0 && !options.isPartialAllowed) throw givenUp();
      const watch = new MigrationWatch(clone.vm.qmp);
      watches.set(clone, watch);
      await load(clone.vm, watch);
      return watch;
    });
    const loaded = settle(clones, loads);
    if (failures.length > 0 && !options.isPartialAllowed) return { running: [], failures };
    const runs = await inParallel(loaded, loaded.length, async ({ clone, value: watch }) => {
      await letRun(clone.vm, watch);
      return performance.now();
    });
    const running = settle(
      loaded.map(({ clone }) => clone),
      runs,
    );
    return { running: running.map(({ clone, value }) => ({ ...clone, resumedAtMs: value })), failures };
  } finally {
    for (const watch of watches.values()) watch.end();
  }
}

async function load(vm: ManagedVm, watch: MigrationWatch): Promise<void> {
  try {
    hasten(vm.pid);
    await vm.qmp.execute('migrate-incoming', { uri: STATE_URI });
    await watch.reached('completed', LOAD_TIMEOUT_MS);
  } catch (error) {
    throw await inItsWords(vm, error);
  }
}

async function letRun(vm: ManagedVm, watch: MigrationWatch): Promise<void> {
  try {
    const resumed = watch.resumed(RESUME_TIMEOUT_MS);
    await Promise.race([resumed, vm.qmp.execute('cont').then(() => resumed)]);
    unhasten(vm.pid);
  } catch (error) {
    throw await inItsWords(vm, error);
  }
}

/** With what QEMU has said, if it has ended. */
async function inItsWords(vm: ManagedVm, thrown: unknown): Promise<MigrationError> {
  const error = toMigrationError(thrown);
  if (error.code !== 'QEMU_GONE' && error.code !== 'QEMU_FAILED') return error;
  await sleep(LAST_WORDS_MS);
  const words = await outputTail(join(vm.directory, 'qemu.log'));
  if (words === '') return error;
  return new MigrationError('QEMU_FAILED', `${error.message}: ${words}`, { cause: error, details: { output: words } });
}

function givenUp(): MigrationError {
  return new MigrationError('CANCELLED', 'another clone of the fork has failed');
}

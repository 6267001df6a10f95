/**
 * Turns waiting processes into running clones, in two calls with the commit between them. `load` loads the state into
 * every clone; no vCPU runs. `run` resumes them all. So no guest takes the processor from clones that still load, and
 * no clone has run if the fork is undone. A clone costs two commands and two events. Nothing is polled, and nothing is
 * written to disk.
 */
import { availableParallelism } from 'node:os';
import type { FileLoad } from '../../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import type { CloneFailure, CloneIdentity } from '../../../domain/fork.js';
import type { InjectPort } from '../../../engine/ports/inject.js';
import { inParallel } from '../../../kit/parallel.js';
import { raisePriority, restorePriority } from '../../vm/priority.js';
import type { ManagedVm, VmManager } from '../../vm/vms.js';

/** A load is bound by the processor and takes some milliseconds, of which a part is spent waiting for this daemon. */
const LOADS_AT_ONCE_MIN = 8;
/** QEMU gives no memory back from the load to the resume. A clone that waits longer for its go does so again. */
const TRIM_HELD_MS_MAX = 60_000;
/** The reason in the exit of a clone that could not be resumed. */
const NOT_RESUMED = 'not-resumed';

export interface WaitingClone {
  readonly identity: CloneIdentity;
  readonly vm: ManagedVm;
}

export interface CloneStartOptions {
  /** Absent: those that this process may use. */
  readonly processorCount?: number;
  readonly vms: Pick<VmManager, 'endClone'>;
  readonly inject: InjectPort;
  /** The daemon exits. Its calls to QEMU fail then, which says nothing about the clones. */
  readonly isClosing: () => boolean;
  /** The clones that an earlier daemon has resumed, by their index: the time in ms since 1970. */
  readonly readyAtMs: ReadonlyMap<number, number>;
}

export class CloneStarts {
  readonly #options: CloneStartOptions;
  readonly #loadsAtOnce: number;
  readonly #readyAtMs: Map<number, number>;
  /** The loads of this daemon. */
  readonly #loads = new Map<ManagedVm, FileLoad>();

  constructor(options: CloneStartOptions) {
    this.#options = options;
    this.#loadsAtOnce = Math.max(LOADS_AT_ONCE_MIN, options.processorCount ?? availableParallelism());
    this.#readyAtMs = new Map(options.readyAtMs);
  }

  /** The clones that are known to have run, by their index: the time at which they had resumed, in ms since 1970. */
  get readyAtMs(): ReadonlyMap<number, number> {
    return this.#readyAtMs;
  }

  /** Returns the clones that have loaded the state. With `isPartialAllowed` the others do not keep these from it. */
  async load(
    clones: readonly WaitingClone[],
    options: { isPartialAllowed: boolean },
  ): Promise<{ readonly loaded: readonly WaitingClone[]; readonly failures: readonly CloneFailure[] }> {
    let hasFailed = false;
    const outcomes = await inParallel(clones, this.#loadsAtOnce, async ({ vm }) => {
      if (hasFailed && !options.isPartialAllowed) throw otherCloneFailed();
      const load = vm.process.loadFile();
      this.#loads.set(vm, load);
      try {
        raisePriority(vm.pid);
        vm.memory?.holdTrim(TRIM_HELD_MS_MAX);
        await load.loaded();
      } catch (error) {
        hasFailed = true;
        vm.memory?.holdTrim(0);
        throw await vm.process.explain(error);
      }
    });
    const errorOf = (position: number): { error: unknown } | null => {
      const outcome = outcomes[position];
      return outcome !== undefined && 'error' in outcome ? outcome : null;
    };
    return {
      loaded: clones.filter((_, position) => errorOf(position) === null),
      failures: clones.flatMap(({ identity: { index, name } }, position) => {
        const failed = errorOf(position);
        return failed === null ? [] : [{ index, name, error: failed.error }];
      }),
    };
  }

  /**
   * Resumes the clones that have not run. One that cannot be resumed is ended and returned as a failure; the others
   * run. If it rejects, a repeated call does the rest.
   */
  async run(clones: readonly WaitingClone[]): Promise<CloneFailure[]> {
    const outcomes = await inParallel(clones, clones.length, async (clone, position) => {
      // A test stops the daemon here, when some of the clones run.
      if (position > 0) await this.#options.inject.hit('agent:fork:resume');
      return this.#run(clone);
    });
    const failures: CloneFailure[] = [];
    for (const outcome of outcomes) {
      if ('error' in outcome) throw outcome.error;
      if (outcome.value !== null) failures.push(outcome.value);
    }
    return failures;
  }

  /** Asks the processes of an earlier daemon which clones have run. What cannot be asked is left out. */
  async look(clones: readonly WaitingClone[]): Promise<void> {
    await inParallel(clones, clones.length, async ({ identity, vm }) => {
      if (this.#readyAtMs.has(identity.index)) return;
      if (hasRun(vm) || (vm.state === 'incoming' && (await vm.process.loadState()) === 'hasRun')) {
        this.#isReady(identity.index);
      }
    });
  }

  /** The same, as the record keeps them. */
  async ready(clones: readonly WaitingClone[]): Promise<{ readonly index: number; readonly at: string }[]> {
    await this.look(clones);
    return [...this.#readyAtMs].map(([index, atMs]) => ({ index, at: new Date(atMs).toISOString() }));
  }

  /**
   * Asks the processes of an earlier daemon whether each has loaded the state, or has ended since. Throws UNREACHABLE
   * if one does not answer yet: that says nothing about its state.
   */
  async haveLoaded(clones: readonly WaitingClone[]): Promise<boolean> {
    const outcomes = await inParallel(clones, clones.length, async ({ vm }) => {
      return vm.state === 'stopped' || (vm.state === 'incoming' && (await vm.process.loadState()) === 'loaded');
    });
    if (outcomes.some((outcome) => 'value' in outcome && !outcome.value)) return false;
    for (const [position, outcome] of outcomes.entries()) {
      if (!('error' in outcome)) continue;
      const cause = toMigrationError(outcome.error);
      const name = clones[position]?.identity.name ?? 'a clone';
      throw new MigrationError('UNREACHABLE', `the QEMU of ${name} does not answer yet: ${cause.message}`, {
        isRetryable: true,
        cause,
      });
    }
    return true;
  }

  /** Ends the clones that have not run, and never will. Rejects if one of them does not answer. */
  async endUnrun(clones: readonly WaitingClone[], reason: string): Promise<void> {
    const outcomes = await inParallel(clones, clones.length, async ({ identity, vm }) => {
      if (this.#readyAtMs.has(identity.index) || hasRun(vm) || vm.state !== 'incoming') return;
      if ((await vm.process.loadState()) !== 'hasRun') await this.#options.vms.endClone(vm, reason);
    });
    for (const outcome of outcomes) if ('error' in outcome) throw outcome.error;
  }

  /** Gives up the loads in progress. */
  end(): void {
    for (const [vm, load] of this.#loads) {
      load.end();
      vm.memory?.holdTrim(0);
    }
    this.#loads.clear();
  }

  async #run({ identity: { index, name }, vm }: WaitingClone): Promise<CloneFailure | null> {
    if (this.#readyAtMs.has(index)) return null;
    try {
      // What has run may have been paused by its user.
      if (!hasRun(vm)) await this.#resume(vm);
      this.#isReady(index);
      return null;
    } catch (thrown) {
      if (this.#options.isClosing()) throw thrown;
      const error = await vm.process.explain(thrown);
      await this.#options.vms.endClone(vm, NOT_RESUMED);
      return { index, name, error };
    }
  }

  async #resume(vm: ManagedVm): Promise<void> {
    if (vm.state !== 'incoming') throw new MigrationError('QEMU_GONE', `${vm.spec.name} has ended`);
    const load = this.#loads.get(vm);
    this.#loads.delete(vm);
    try {
      await (load === undefined ? vm.process.runLoaded() : load.run());
    } catch (error) {
      // If the connection was lost, QEMU may be alive and be connected again.
      if (load === undefined || toMigrationError(error).code !== 'QEMU_GONE') throw error;
      await vm.process.runLoaded();
    } finally {
      load?.end();
      vm.memory?.holdTrim(0);
    }
    restorePriority(vm.pid);
  }

  #isReady(index: number): void {
    if (!this.#readyAtMs.has(index)) this.#readyAtMs.set(index, performance.timeOrigin + performance.now());
  }
}

/** True if the VM's own record says so. A clone that has not run is `incoming` by its record until it has settled. */
function hasRun({ state, guestEnd }: ManagedVm): boolean {
  return guestEnd !== null || (state !== 'incoming' && state !== 'stopped');
}

/** A failure as other hosts get it. */
export function failureInJson({ index, name, error }: CloneFailure): CloneFailure {
  return { index, name, error: toMigrationError(error).toJSON() };
}

function otherCloneFailed(): MigrationError {
  return new MigrationError('CANCELLED', 'another clone of the fork has failed');
}

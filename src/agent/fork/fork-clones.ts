/** The clones of one fork on this host: waiting QEMUs that become running VMs. */
import type { CloneFailure, CloneIdentity } from '../../domain/fork.js';
import type { ManagedVm } from '../vm/vms.js';
import { CloneStarts, type WaitingClone } from './clones/start.js';
import type { ForkContext } from './context.js';
import type { ForkPages } from './pages.js';
import type { ForkOutcome } from './record.js';
import { refuseIfRun } from './undo.js';
import { endClones } from './waiting-set.js';

export interface ForkClonesParts {
  readonly clones: readonly WaitingClone[];
  readonly pages: ForkPages;
  /** What an earlier daemon has recorded. */
  readonly ready: ForkOutcome['ready'];
  readonly isClosing: () => boolean;
}

export class ForkClones {
  readonly #context: ForkContext;
  readonly #pages: ForkPages;
  readonly #starts: CloneStarts;
  #all: readonly WaitingClone[];

  constructor(context: ForkContext, { clones, pages, ready, isClosing }: ForkClonesParts) {
    this.#context = context;
    this.#pages = pages;
    this.#all = clones;
    this.#starts = new CloneStarts({
      ...{ vms: context.vms, inject: context.inject, isClosing },
      readyAtMs: new Map(ready.map(({ index, at }) => [index, Date.parse(at)])),
    });
  }

  get vms(): ManagedVm[] {
    return this.#all.map(({ vm }) => vm);
  }

  get identities(): CloneIdentity[] {
    return this.#all.map(({ identity }) => identity);
  }

  has(vm: ManagedVm): boolean {
    return this.#all.some((clone) => clone.vm === vm);
  }

  /** A clone has not run, as far as this daemon knows. */
  get isAnyWaiting(): boolean {
    const { vms } = this.#context;
    const isThere = ({ vm }: WaitingClone) => vms.has(vm.spec.name) && vms.get(vm.spec.name) === vm;
    return this.#all.some((clone) => clone.vm.state === 'incoming' && isThere(clone));
  }

  /** Those that are known to have run. */
  get running(): readonly WaitingClone[] {
    return this.#all.filter(({ identity }) => this.#starts.readyAtMs.has(identity.index));
  }

  /** When each of them had resumed, in ms since 1970. */
  get readyAtMs(): ReadonlyMap<number, number> {
    return this.#starts.readyAtMs;
  }

  /** The same, asked of the QEMUs of an earlier daemon, as the record keeps it. */
  ready(): Promise<ForkOutcome['ready']> {
    return this.#starts.ready(this.#all);
  }

  /** An earlier daemon has loaded them. */
  haveLoaded(): Promise<boolean> {
    return this.#starts.haveLoaded(this.#all);
  }

  load(options: { isPartialAllowed: boolean }): ReturnType<CloneStarts['load']> {
    return this.#starts.load(this.#all, options);
  }

  /** Ends the others. */
  async keep(loaded: readonly WaitingClone[]): Promise<void> {
    await this.#end(this.#all.filter((clone) => !loaded.includes(clone)));
    this.#all = loaded;
  }

  run(): Promise<CloneFailure[]> {
    return this.#starts.run(this.#all);
  }

  /** Ends those that have not run, and never will. */
  endUnrun(reason: string): Promise<void> {
    return this.#starts.endUnrun(this.#all, reason);
  }

  /** Throws if one has run, or has run and been paused. */
  refuseIfRun(): void {
    refuseIfRun(this.#all);
  }

  endLoads(): void {
    this.#starts.end();
  }

  async end(): Promise<void> {
    await this.#end(this.#all);
  }

  async unreserve(job: string): Promise<void> {
    for (const { spec } of this.vms) await this.#context.vms.unreserve(spec.name, job);
  }

  async #end(clones: readonly WaitingClone[]): Promise<void> {
    for (const { vm } of clones) await this.#pages.drop(vm);
    await endClones(this.#context, clones);
  }
}

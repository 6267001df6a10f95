/** QEMUs that wait for a fork that has not been asked for yet. */
import type { PrepareForkRequest } from '../engine/fork-ports.js';
import type { ForkContext } from './fork-context.js';
import type { ManagedVm } from './vms.js';
import { type CloneShape, endClones, type WaitingSet } from './waiting-set.js';

export interface PooledSet extends WaitingSet {
  readonly image: string;
  readonly shape: CloneShape;
}

type ShapeQuestion = Omit<CloneShape, 'parent' | 'accel'>;

export class Pool {
  readonly #context: ForkContext;

  constructor(context: ForkContext) {
    this.#context = context;
  }

  /** Takes a set that fits out of the pool. null: there is none. */
  async claim(_shape: CloneShape): Promise<PooledSet | null> {
    return null;
  }

  /** One that a fork of this VM would take. */
  find(_parent: ManagedVm, _question: ShapeQuestion): PooledSet | null {
    return null;
  }

  async dispose(set: PooledSet): Promise<void> {
    await endClones(this.#context, set.clones);
    await this.#context.images.delete(set.image);
  }

  wake(_request: PrepareForkRequest): void {}
}

/** For simulations of migrations: their host forks nothing. */

import { MigrationError } from '../../src/domain/errors.js';
import type { ForkAgentPort } from '../../src/engine/ports/fork.js';

export function noForks(host: string): ForkAgentPort {
  const fail = (): Promise<never> => Promise.reject(new MigrationError('UNSUPPORTED', `${host} cannot fork VMs`));
  return {
    host,
    forkInventory: fail,
    prepareClones: fail,
    armParent: fail,
    forkPoint: fail,
    startClones: fail,
    commitFork: fail,
    forkProgress: fail,
    finishFork: fail,
    discardFork: fail,
  };
}

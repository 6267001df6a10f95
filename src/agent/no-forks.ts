/** For a host that cannot fork VMs: every question about it is answered, every act refused. */
import type { ForkAgentPort } from '../engine/fork-ports.js';
import { MigrationError } from '../errors.js';

function refusal(host: string): () => Promise<never> {
  return () => Promise.reject(new MigrationError('UNSUPPORTED', `${host} cannot fork VMs`));
}

export function noForks(host: string): ForkAgentPort {
  const fail = refusal(host);
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

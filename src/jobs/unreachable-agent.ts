import { MigrationError } from '../domain/errors.js';
import type { AgentPort } from '../engine/ports/agent.js';

/** Stands for a host that nobody knows how to reach: every call fails with UNREACHABLE. */
export function unreachableAgent(host: string, cause: unknown): AgentPort {
  const fail = (): Promise<never> =>
    Promise.reject(new MigrationError('UNREACHABLE', `${host} is not among the peers`, { cause }));
  return {
    host,
    inventory: fail,
    vmInventory: fail,
    checkTarget: fail,
    prepare: fail,
    connect: fail,
    awaitLoaded: fail,
    resume: fail,
    progress: fail,
    reconnect: fail,
    inherit: fail,
    finish: fail,
    discard: fail,
    reserve: fail,
    unreserve: fail,
    expose: fail,
    unexpose: fail,
    stop: fail,
    continueVm: fail,
    transferState: fail,
    nativeMigrate: fail,
    nativeProgress: fail,
    nativeCancel: fail,
    sourceCounters: fail,
    release: fail,
  };
}

/** A host that is no peer any more does not answer either; the source's half of an undo must not suffer from it. */
export function agentOrUnreachable(agent: (host: string) => AgentPort, host: string): AgentPort {
  try {
    return agent(host);
  } catch (error) {
    return unreachableAgent(host, error);
  }
}

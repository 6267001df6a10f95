import { MigrationError } from '../domain/errors.js';
import type { HostPort, HostRole } from '../engine/ports/host.js';

function unknownHost(host: string, code: 'UNREACHABLE' | 'NOT_FOUND', cause: unknown): HostPort {
  const fail = (): Promise<never> =>
    Promise.reject(new MigrationError(code, `${host} is not among the peers of this host`, { cause }));
  const role = new Proxy({}, { get: () => fail });
  const roles: Record<HostRole, object> = {
    ...{ inventory: role, source: role, target: role, forks: role, fanout: role, images: role },
  };
  return { host, ...roles } as HostPort;
}

/** Stands for a host whose address is not known: every call of every role fails with UNREACHABLE. */
export function unreachableHost(host: string, cause: unknown): HostPort {
  return unknownHost(host, 'UNREACHABLE', cause);
}

/**
 * Returns the host's port. A host that is no longer a peer counts as unreachable, so that the undo on the source still
 * runs.
 */
export function hostOrUnreachable(agent: (host: string) => HostPort, host: string): HostPort {
  try {
    return agent(host);
  } catch (error) {
    return unreachableHost(host, error);
  }
}

/**
 * Returns the host's port. A host that is no longer a peer has nothing of a fork any more: so a user gives up a host
 * that does not come back.
 */
export function hostOrGone(agent: (host: string) => HostPort, host: string): HostPort {
  try {
    return agent(host);
  } catch (error) {
    return unknownHost(host, 'NOT_FOUND', error);
  }
}

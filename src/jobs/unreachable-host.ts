import { MigrationError } from '../domain/errors.js';
import type { HostPort, HostRole } from '../engine/ports/host.js';

/** Stands for a host that nobody knows how to reach: every call of every role fails with UNREACHABLE. */
export function unreachableHost(host: string, cause: unknown): HostPort {
  const fail = (): Promise<never> =>
    Promise.reject(new MigrationError('UNREACHABLE', `${host} is not among the peers`, { cause }));
  const role = new Proxy({}, { get: () => fail });
  const roles: Record<HostRole, object> = { inventory: role, source: role, target: role, forks: role };
  return { host, ...roles } as HostPort;
}

/** A host that is no peer any more does not answer either; the source's half of an undo must not suffer from it. */
export function hostOrUnreachable(agent: (host: string) => HostPort, host: string): HostPort {
  try {
    return agent(host);
  } catch (error) {
    return unreachableHost(host, error);
  }
}

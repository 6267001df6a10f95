/** Who makes a request to a daemon, and what for. docs/SECURITY.md says what each role may do. */

/** From the least to the most. */
export const USER_ROLES = ['viewer', 'operator', 'admin'] as const;
export type UserRole = (typeof USER_ROLES)[number];

/** What a request needs: at least this role, or to come from another host. */
export type Right = UserRole | 'host';

export interface Caller {
  /** "user/alice" and "host/B" by certificate, "token/ci" by token, "local/1000" by the uid of a process. */
  readonly name: string;
  readonly role: UserRole | 'host';
  /** An IP address, or "unix socket". */
  readonly from: string;
}

/** A host may look at what clients may look at. It changes something only by the calls that are reserved for hosts. */
export function has(role: Caller['role'], right: Right): boolean {
  if (right === 'host' || role === 'host') return role === right || right === 'viewer';
  return USER_ROLES.indexOf(role) >= USER_ROLES.indexOf(right);
}

/** The name of the host that calls, or null if no host does. */
export function hostNameOf(caller: Caller | null): string | null {
  return caller?.role === 'host' ? caller.name.slice('host/'.length) : null;
}

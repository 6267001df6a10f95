/**
 * The identity that a certificate proves. The cluster's CA writes the role and the name into the common name ("host/A",
 * "user/alice"), and what a user may do into the organizational unit ("operator"). Nothing else in a certificate
 * counts, and never an address: a host with a new address is still the same host.
 */
import type { PeerCertificate } from 'node:tls';
import { USER_ROLES, type UserRole } from '../domain/caller.js';
import { MigrationError } from '../domain/errors.js';

export type Role = 'host' | 'user';

export interface Identity {
  readonly role: Role;
  readonly name: string;
}

/** An identity as a certificate proves it. Without a unit, as in certificates of earlier builds, a user may look. */
export type ProvenIdentity =
  | { readonly role: 'host'; readonly name: string }
  | { readonly role: 'user'; readonly name: string; readonly userRole: UserRole };

/** The longest name. With role and slash it fits the 64 characters that X.509 allows in a common name. */
const NAME_LENGTH_MAX = 48;
const NAME = /^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$/;

export function isName(text: string): boolean {
  return text.length <= NAME_LENGTH_MAX && NAME.test(text);
}

export function commonName(identity: Identity): string {
  return `${identity.role}/${identity.name}`;
}

/** Returns the identity, or null unless the text is exactly one common name of the form ROLE/NAME. */
export function parseCommonName(text: unknown): Identity | null {
  if (typeof text !== 'string') return null;
  const slash = text.indexOf('/');
  const role = text.slice(0, Math.max(slash, 0));
  const name = text.slice(slash + 1);
  if ((role !== 'host' && role !== 'user') || !isName(name)) return null;
  return { role, name };
}

/** Returns the role that the subject of a user's certificate gives, as node:crypto prints it: one attribute a line. */
export function roleIn(subject: string): UserRole {
  const units = [...subject.matchAll(/^OU=(.*)$/gm)].map(([, unit]) => unit);
  return USER_ROLES.find((role) => units.length === 1 && role === units[0]) ?? 'viewer';
}

export function identityOf(certificate: Pick<PeerCertificate, 'subject'> | undefined): ProvenIdentity | null {
  const subject = certificate?.subject as { CN?: unknown; OU?: unknown } | undefined;
  const identity = parseCommonName(subject?.CN);
  if (identity === null) return null;
  const { role, name } = identity;
  if (role === 'host') return { role, name };
  // Several units are an array, which is none of ours.
  return { role, name, userRole: USER_ROLES.find((known) => known === subject?.OU) ?? 'viewer' };
}

/**
 * Serves as `checkServerIdentity` of a connection to a peer. The chain has been verified already; here the certificate
 * must be that of the expected host. Returns the error, as node:tls requires.
 */
export function checkHostIdentity(
  expected: string | null,
): (address: string, certificate: PeerCertificate) => Error | undefined {
  return (address, certificate) => {
    const identity = identityOf(certificate);
    if (identity?.role === 'host' && (expected === null || identity.name === expected)) return undefined;
    const shown =
      identity === null ? 'a certificate without a name of this cluster' : `the certificate of ${commonName(identity)}`;
    const wanted = expected === null ? 'a host of the cluster' : `host ${expected}`;
    return new MigrationError('UNAUTHENTICATED', `${address} presents ${shown}, not that of ${wanted}`);
  };
}

/**
 * The identity that a certificate proves. The cluster's CA writes the role and the name into the common name ("host/A",
 * "user/alice"). Nothing else in a certificate counts, and never an address: a host with a new address is still the
 * same host.
 */
import type { PeerCertificate } from 'node:tls';
import { MigrationError } from '../domain/errors.js';

export type Role = 'host' | 'user';

export interface Identity {
  readonly role: Role;
  readonly name: string;
}

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

export function identityOf(certificate: Pick<PeerCertificate, 'subject'> | undefined): Identity | null {
  return parseCommonName((certificate?.subject as { CN?: unknown } | undefined)?.CN);
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

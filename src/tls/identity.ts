/**
 * Who a certificate speaks for. The cluster's CA puts the role and the name into the common name ("host/A",
 * "user/alice"); nothing else in a certificate is believed, and an address never is: a host that moves to another
 * address is still the same host.
 */
import type { PeerCertificate } from 'node:tls';
import { MigrationError } from '../domain/errors.js';

export type Role = 'host' | 'user';

export interface Identity {
  readonly role: Role;
  readonly name: string;
}

/** Fits the 64 characters that X.509 allows a common name, role and slash included. */
const NAME_LENGTH_MAX = 48;
const NAME = /^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$/;

export function isName(text: string): boolean {
  return text.length <= NAME_LENGTH_MAX && NAME.test(text);
}

export function commonName(identity: Identity): string {
  return `${identity.role}/${identity.name}`;
}

/** Null for anything but exactly one common name of our shape. */
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
 * For `checkServerIdentity` of a connection to a peer: the chain has been verified, now the certificate must be that of
 * the host we meant. Returns the error, as node:tls wants it.
 */
export function checkHostIdentity(
  expected: string | null,
): (address: string, certificate: PeerCertificate) => Error | undefined {
  return (address, certificate) => {
    const identity = identityOf(certificate);
    if (identity?.role === 'host' && (expected === null || identity.name === expected)) return undefined;
    const shown =
      identity === null ? 'a certificate without a name of ours' : `the certificate of ${commonName(identity)}`;
    const wanted = expected === null ? 'a host of the cluster' : `host ${expected}`;
    return new MigrationError('UNAUTHENTICATED', `${address} shows ${shown}, not that of ${wanted}`);
  };
}

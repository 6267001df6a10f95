/**
 * Who may call what. The unix socket is its file's owner's; on https every connection has shown a certificate of the
 * cluster (the handshake has seen to that) and here its name decides: clients' routes for hosts and users, hosts'
 * routes for the hosts that this one knows. Asked for each request, so that a revocation reaches connections that are
 * open.
 */
import type { Socket } from 'node:net';
import { TLSSocket } from 'node:tls';
import { MigrationError } from '../domain/errors.js';
import { commonName } from '../tls/identity.js';
import type { ApiServices } from './contract/ports.js';

export const HOST_ROUTES = '/agent/';

/**
 * `isHostRoute` is about the route that will run, never about the address as it was written, which may be escaped.
 * Throws UNAUTHENTICATED, or NOT_PERMITTED for somebody whom we know but do not let do this. Returns the caller's name
 * for the log.
 */
export function authorize(socket: Socket, isHostRoute: boolean, services: ApiServices): string {
  if (!(socket instanceof TLSSocket)) {
    if (isHostRoute) throw new MigrationError('NOT_PERMITTED', 'calls between hosts go over mutual TLS only');
    return 'local';
  }
  const identity = services.tls?.peerOf(socket) ?? null;
  if (identity === null) throw new MigrationError('UNAUTHENTICATED', 'no valid certificate of this cluster');
  const caller = commonName(identity);
  if (isHostRoute && identity.role !== 'host')
    throw new MigrationError('NOT_PERMITTED', `${caller} may not make calls that only hosts may make`);
  if (isHostRoute && !services.peers.names.includes(identity.name))
    throw new MigrationError('NOT_PERMITTED', `host ${services.host} does not know host ${identity.name}`, {
      remedy: `name it in the daemon's configuration: --peer ${identity.name}=https://ADDRESS:PORT`,
    });
  return caller;
}

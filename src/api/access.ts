/**
 * Access control of the API. The file mode of the unix socket restricts it to its owner. On https the handshake demands
 * a certificate of the cluster, and its name decides here: hosts and users may call the clients' routes, and the hosts
 * that this host knows may call the hosts' routes. The check runs for each request, so a revocation also takes effect
 * on open connections.
 */
import type { Socket } from 'node:net';
import { TLSSocket } from 'node:tls';
import { MigrationError } from '../domain/errors.js';
import { commonName } from '../tls/identity.js';
import type { ApiServices } from './contract/ports.js';

export const HOST_ROUTES = '/agent/';

/**
 * Checks a request and returns the caller's name for the log. `isHostRoute` describes the route that will run, not the
 * URL as written, which may be escaped. Throws UNAUTHENTICATED, or NOT_PERMITTED for a known caller without the right
 * to make this call.
 */
export function authorize(socket: Socket, isHostRoute: boolean, services: ApiServices): string {
  if (!(socket instanceof TLSSocket)) {
    if (isHostRoute) throw new MigrationError('NOT_PERMITTED', 'calls between hosts need mutual TLS');
    return 'local';
  }
  const identity = services.tls?.peerOf(socket) ?? null;
  if (identity === null) throw new MigrationError('UNAUTHENTICATED', 'no valid certificate of this cluster');
  const caller = commonName(identity);
  if (isHostRoute && identity.role !== 'host')
    throw new MigrationError('NOT_PERMITTED', `${caller} may not make calls that are reserved for hosts`);
  if (isHostRoute && !services.peers.names.includes(identity.name))
    throw new MigrationError('NOT_PERMITTED', `host ${services.host} does not know host ${identity.name}`, {
      remedy: `add it to the daemon's configuration: --peer ${identity.name}=https://ADDRESS:PORT`,
    });
  return caller;
}

/**
 * Access control of the API: who calls, and whether they may. A caller on the unix socket is known by the uid of its
 * process, which the kernel says. On https it is known by a certificate of the cluster, or else by a bearer token. The
 * check runs for each request, and a revocation ends open connections (server.ts). docs/SECURITY.md has the roles.
 */
import type { IncomingMessage } from 'node:http';
import { TLSSocket } from 'node:tls';
import { type Caller, has, hostNameOf, type Right } from '../domain/caller.js';
import { MigrationError } from '../domain/errors.js';
import { commonName } from '../tls/identity.js';
import { identify } from './connections.js';
import type { ApiServices } from './contract/ports.js';

export const HOST_ROUTES = '/agent/';
const BEARER = /^Bearer +(\S{1,256})$/i;

/**
 * Returns the caller of a request. `right` is what the route that will run needs, whatever the URL looks like. Throws
 * UNAUTHENTICATED, or NOT_PERMITTED for a known caller without that right; `onCaller` has been called then.
 */
export function authorize(
  request: IncomingMessage,
  right: Right,
  services: ApiServices,
  onCaller: (caller: Caller) => void = () => undefined,
): Caller {
  const caller = callerOf(request, services);
  onCaller(caller);
  refuseOtherSites(request);
  if (right === 'host') refuseUnknownHost(request, caller, services);
  if (!has(caller.role, right)) throw missing(caller, right);
  return caller;
}

function callerOf(request: IncomingMessage, { tls, tokens, localCaller }: ApiServices): Caller {
  const { socket } = request;
  if (!(socket instanceof TLSSocket)) return localCaller(socket);
  const from = socket.remoteAddress ?? '';
  const identity = tls?.peerOf(socket) ?? null;
  if (identity !== null) {
    const role = identity.role === 'host' ? 'host' : identity.userRole;
    return { name: commonName(identity), role, from };
  }
  const [, token] = BEARER.exec(request.headers.authorization ?? '') ?? [];
  const holder = token === undefined ? null : tokens.holderOf(token);
  if (holder !== null) {
    const name = `token/${holder.name}`;
    if (!identify(socket, name)) {
      throw new MigrationError('CONFLICT', `${name} has too many connections`, {
        isRetryable: true,
        remedy: 'end some of its clients, or make each client a token of its own',
      });
    }
    return { name, role: holder.role, from };
  }
  const what = token === undefined ? 'no valid certificate of this cluster' : 'the token is not valid on this host';
  throw new MigrationError('UNAUTHENTICATED', what, {
    remedy: 'tokens expire and belong to one host ("vmctl token list" there); certificates: vmctl certs show',
  });
}

function refuseUnknownHost({ socket }: IncomingMessage, caller: Caller, { host, peers }: ApiServices): void {
  if (!(socket instanceof TLSSocket)) throw new MigrationError('NOT_PERMITTED', 'calls between hosts need mutual TLS');
  const name = hostNameOf(caller);
  if (name === null || peers.names.includes(name)) return;
  throw new MigrationError('NOT_PERMITTED', `host ${host} does not know host ${name}`, {
    remedy: `add it to the daemon's configuration: --peer ${name}=https://ADDRESS:PORT`,
  });
}

/**
 * A browser sends a client certificate with the requests of any page that it shows. The API has no pages of its own, so
 * that a request that a page has made comes from a stranger.
 */
function refuseOtherSites({ headers }: IncomingMessage): void {
  const site = headers['sec-fetch-site'];
  if (headers.origin === undefined && (site === undefined || site === 'none')) return;
  throw new MigrationError('NOT_PERMITTED', 'requests that a web page has made are refused');
}

function missing({ name, role }: Caller, right: Right): MigrationError {
  if (right === 'host') return new MigrationError('NOT_PERMITTED', `${name} may not make calls reserved for hosts`);
  const has = role === 'host' ? 'hosts change nothing here' : `its role is ${role}`;
  return new MigrationError('NOT_PERMITTED', `${name} may not do this: it needs the role ${right}, and ${has}`, {
    remedy: `ask for a certificate (vmctl certs user NAME --role ${right}) or a token (vmctl token create)`,
  });
}

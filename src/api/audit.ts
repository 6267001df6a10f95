/** The audit log: who has changed what, from where, and with what result; and who was refused. */
import type { FastifyRequest } from 'fastify';
import { HOST_ROUTES } from './access.js';
import type { AuditEntry } from './contract/ports.js';

const REFUSALS: ReadonlySet<number> = new Set([401, 403]);
const TEXT_CHARS_MAX = 512;

/** Returns the entry for an answered request of a client, or null if it has only looked. */
export function auditOf(request: FastifyRequest, status: number): AuditEntry | null {
  const { method, caller, routeOptions, failure } = request;
  const route = routeOptions.url ?? 'an address that does not exist';
  // Calls between hosts have entries of their own, with their arguments.
  if (route.startsWith(HOST_ROUTES) && !REFUSALS.has(status)) return null;
  if (method === 'GET' && !REFUSALS.has(status)) return null;
  return {
    who: caller?.name ?? 'unknown',
    from: caller?.from ?? request.raw.socket.remoteAddress ?? '',
    what: `${method} ${route}`,
    object: request.auditObject ?? objectOf(request.params),
    result: failure?.code ?? (status < 400 ? 'ok' : 'USAGE'),
    ...(failure === undefined ? {} : { message: failure.message.slice(0, TEXT_CHARS_MAX) }),
  };
}

function objectOf(params: unknown): string | null {
  if (typeof params !== 'object' || params === null) return null;
  const values = Object.values(params).filter((value) => typeof value === 'string');
  return values.length === 0 ? null : values.join('/').slice(0, TEXT_CHARS_MAX);
}

/**
 * The audit log: who has changed what, from where, and with what result; and who was refused. The callers are users and
 * other hosts.
 */
import type { FastifyRequest } from 'fastify';
import { HOST_ROUTES } from './access.js';
import type { AuditEntry } from './contract/ports.js';

const REFUSALS: ReadonlySet<number> = new Set([401, 403]);
const TEXT_CHARS_MAX = 512;

/** Returns the entry for a request, or null if it has only looked. `status`: null if the client has not waited. */
export function auditOf(request: FastifyRequest, status: number | null): AuditEntry | null {
  const { method, caller, routeOptions, failure, hostCall } = request;
  const route = routeOptions.url ?? 'an address that does not exist';
  const isRefused = status !== null && REFUSALS.has(status);
  const isChange = route.startsWith(HOST_ROUTES) ? hostCall?.isChange === true : method !== 'GET';
  if (!isChange && !isRefused) return null;
  return {
    who: caller?.name ?? 'unknown',
    from: caller?.from ?? request.raw.socket.remoteAddress ?? '',
    what: hostCall?.name ?? `${method} ${route}`,
    object: request.auditObject?.slice(0, TEXT_CHARS_MAX) ?? objectOf(request.params),
    result: failure?.code ?? (status === null ? 'unanswered' : status < 400 ? 'ok' : 'USAGE'),
    ...(failure === undefined ? {} : { message: failure.message.slice(0, TEXT_CHARS_MAX) }),
  };
}

function objectOf(params: unknown): string | null {
  if (typeof params !== 'object' || params === null) return null;
  const values = Object.values(params).filter((value) => typeof value === 'string');
  return values.length === 0 ? null : values.join('/').slice(0, TEXT_CHARS_MAX);
}

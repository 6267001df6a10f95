/** Why another host cannot be reached, as errors for people. */
import { MigrationError } from '../../domain/errors.js';
import type { TlsStore } from '../../tls/store.js';

/** `isOpen`: the connection is open, but the packets of the TLS handshake do not come through. */
export function noConnection(where: string, isOpen: boolean): MigrationError {
  if (!isOpen) return new MigrationError('UNREACHABLE', `${where} does not answer`, { isRetryable: true });
  return new MigrationError('UNREACHABLE', `${where} accepts connections, but does not answer a TLS handshake`, {
    remedy:
      'a network that drops full-size packets does this: compare the MTU of both hosts, and try ' +
      '"ping -M do -s SIZE" with the size of the MTU less 28; or another program listens there',
    isRetryable: true,
  });
}

const CERTIFICATE_ERROR = /^(CERT_|UNABLE_TO_|DEPTH_ZERO_|SELF_SIGNED_|CRL_|INVALID_|ERR_TLS_|ERR_SSL_|EPROTO)/;

export function connectionError(error: NodeJS.ErrnoException, where: string, url: string): MigrationError {
  if (error instanceof MigrationError) return error;
  const reason = error.code ?? error.message;
  if (CERTIFICATE_ERROR.test(reason))
    return new MigrationError(
      'UNAUTHENTICATED',
      `${where} and this host do not accept each other's certificates: ${reason}`,
      {
        remedy:
          'compare both certificates (vmctl certs show --dir TLS_DIR) and the clocks of both hosts (date); ' +
          'an expired one is replaced with vmctl certs host',
        cause: error,
      },
    );
  return new MigrationError('UNREACHABLE', `${where}${url === '' ? '' : ` (${url})`} cannot be reached: ${reason}`, {
    isRetryable: true,
    cause: error,
  });
}

/** A host that refuses a certificate only closes the connection. The usual reasons for that are known here. */
export function withOwnCertificate(error: MigrationError, store: TlsStore | null): MigrationError {
  if (error.code !== 'UNREACHABLE' || store === null || !CLOSED.test(error.message)) return error;
  const nowMs = Date.now();
  const isExpired = Date.parse(store.expiresAt) <= nowMs;
  const isEarly = Date.parse(store.validFrom) > nowMs;
  if (!isExpired && !isEarly)
    return new MigrationError(error.code, error.message, {
      remedy:
        'that host may refuse the certificate of this one: its log has the reason under "refused a connection"; ' +
        'compare the clocks of both hosts (date); else start vmigrated there and check the network',
      isRetryable: true,
      cause: error,
    });
  const when = isExpired ? `expired on ${store.expiresAt}` : `is valid only from ${store.validFrom} on`;
  return new MigrationError('UNAUTHENTICATED', `${error.message}: the certificate of this host ${when}`, {
    remedy: 'check the clock of this host (date); else create a new certificate with vmctl certs host',
    cause: error,
  });
}

const CLOSED = /ECONNRESET|EPIPE|socket hang up/;

/** What another host answers, and why it does not. */
import type { IncomingMessage } from 'node:http';
import { MigrationError } from '../../domain/errors.js';

const ANSWER_BYTES_MAX = 4 * 2 ** 20;

/** Returns the `result` of a host's answer. Throws the error that the answer is. */
export async function readAnswer(response: IncomingMessage, where: string): Promise<unknown> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  try {
    for await (const chunk of response as AsyncIterable<Buffer>) {
      bytes += chunk.length;
      if (bytes > ANSWER_BYTES_MAX)
        throw new MigrationError('PEER_PROTOCOL', `the response of ${where} exceeds ${ANSWER_BYTES_MAX / 2 ** 20} MiB`);
      chunks.push(chunk);
    }
  } catch (error) {
    if (error instanceof MigrationError) throw error;
    throw connectionError(error as NodeJS.ErrnoException, where, '');
  }
  let json: unknown;
  try {
    json = JSON.parse(Buffer.concat(chunks).toString('utf8'));
  } catch (cause) {
    throw new MigrationError('PEER_PROTOCOL', `the response of ${where} is not JSON`, { cause });
  }
  if (response.statusCode !== 200) throw MigrationError.fromJSON(json, where);
  if (typeof json !== 'object' || json === null || !('result' in json))
    throw new MigrationError('PEER_PROTOCOL', `the response of ${where} has no result`);
  return json.result;
}

const CERTIFICATE_ERROR = /^(CERT_|UNABLE_TO_|DEPTH_ZERO_|SELF_SIGNED_|CRL_|INVALID_|ERR_TLS_|ERR_SSL_|EPROTO)/;

/** Says why there is no connection, or no more. */
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

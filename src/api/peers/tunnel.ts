/**
 * Bytes between two hosts over HTTP/1.1 Upgrade: after "101 Switching Protocols" the connection carries a byte stream
 * in both directions, over mutual TLS 1.3. This is the calling side; src/api/tunnels.ts is the other.
 */
import type { IncomingMessage } from 'node:http';
import { request as httpsRequest, type RequestOptions } from 'node:https';
import type { TLSSocket } from 'node:tls';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { checkHostIdentity } from '../../tls/identity.js';
import { readAnswer } from './answer.js';
import { connectionError } from './peer-errors.js';

/** What a tunnel leads to: the path, and the protocol that the upgrade asks for. */
export interface TunnelEnd {
  readonly path: string;
  readonly protocol: string;
}

/** The back end's export of a disk of an image. */
export const diskEnd = (image: string, disk: string): TunnelEnd => ({
  path: `/agent/v1/images/${image}/disks/${disk}`,
  protocol: 'vmigrate-disk',
});
/** The QEMU that waits for QEMU's own migration. */
export const streamEnd = (session: string): TunnelEnd => ({
  path: `/agent/v1/sessions/${session}/stream`,
  protocol: 'vmigrate-stream',
});

/** The other host may have to start the process that serves a disk. */
const OPEN_MS = 20_000;
/** A host without power is noticed some 10 s later. */
export const KEEP_ALIVE_MS = 10_000;

export interface TunnelPlace extends TunnelEnd {
  readonly host: string;
  readonly url: string;
  readonly tls: RequestOptions;
  /** Absent: 20 s. */
  readonly openMs?: number;
}

/** Throws the error with which the host refuses, or UNREACHABLE. */
export function openTunnel({ host, url, path, protocol, tls, openMs = OPEN_MS }: TunnelPlace): Promise<TLSSocket> {
  const where = `host ${host}`;
  return new Promise((resolve, reject) => {
    const request = httpsRequest(new URL(path, url), {
      ...tls,
      agent: false,
      headers: { connection: 'Upgrade', upgrade: protocol },
      checkServerIdentity: checkHostIdentity(host),
    });
    const deadline = setTimeout(() => {
      const late = `${where} (${url}) does not answer within ${openMs / 1000} s`;
      request.destroy(new MigrationError('UNREACHABLE', late, { isRetryable: true }));
    }, openMs);
    request.once('upgrade', (_: IncomingMessage, socket: TLSSocket, head: Buffer) => {
      clearTimeout(deadline);
      socket.on('error', () => socket.destroy());
      socket.setNoDelay(true);
      socket.setKeepAlive(true, KEEP_ALIVE_MS);
      if (head.length > 0) socket.unshift(head);
      resolve(socket);
    });
    request.once('response', (response) => {
      // The body of a refusal may never end.
      readAnswer(response, where)
        .then(
          () => reject(new MigrationError('PEER_PROTOCOL', `${where} does not switch to ${protocol}`)),
          (error: unknown) => reject(toMigrationError(error)),
        )
        .finally(() => clearTimeout(deadline));
    });
    request.once('error', (error) => {
      clearTimeout(deadline);
      reject(connectionError(error, where, url));
    });
    request.end();
  });
}

/**
 * Serves disks of this host's images to hosts that joined their forks (src/api/peers/disk-tunnel.ts). Only hosts that
 * this one knows get a connection, by the name in their certificate. It leads to a process of the back end, which has
 * no key and no socket that others can reach.
 */
import type { IncomingMessage } from 'node:http';
import type { Duplex } from 'node:stream';
import { TLSSocket } from 'node:tls';
import { type Caller, hostNameOf } from '../domain/caller.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { DISK_TUNNELS_MAX } from '../domain/host.js';
import { authorize } from './access.js';
import { refuse } from './console.js';
import type { ApiServices } from './contract/ports.js';
import { DISK_PROTOCOL, diskPath, KEEP_ALIVE_MS } from './peers/disk-tunnel.js';
import { refuseReaderOf } from './peers/peer-rights.js';

const TARGET = new RegExp(`^${diskPath('([0-9a-f]{16})', '([a-z][a-z0-9-]{0,31})')}$`);

export class DiskTunnels {
  private readonly open = new Set<Duplex>();

  constructor(private readonly services: ApiServices) {}

  /** True if the request is for a disk. Then `handle` owns the socket. */
  static isFor({ url }: IncomingMessage): boolean {
    return TARGET.test(url ?? '');
  }

  /** `onOpen` is called when the connection is a tunnel, and carries no more requests. */
  handle(request: IncomingMessage, socket: Duplex, head: Buffer, onOpen: () => void): void {
    socket.on('error', () => socket.destroy());
    this.attach(request, socket, { head, onOpen }).catch((error: unknown) => refuse(socket, error));
  }

  close(): void {
    for (const socket of this.open) socket.destroy();
  }

  /** Returns the host that calls. Throws if it is none, or none that shares the image. */
  private authorize(request: IncomingMessage, image: string): string {
    const { host, agent, audit } = this.services;
    let known: Caller | null = null;
    try {
      const caller = authorize(request, 'host', this.services, (each) => {
        known = each;
      });
      const reader = hostNameOf(caller) ?? '';
      refuseReaderOf({ caller: reader, host, ties: agent.ties }, image);
      return reader;
    } catch (error) {
      const { code, message } = toMigrationError(error);
      const { name: who, from } = known ?? { name: 'unknown', from: request.socket.remoteAddress ?? '' };
      audit.note({ who, from, what: 'openDisk', object: image, result: code, message });
      throw error;
    }
  }

  private async attach(
    request: IncomingMessage,
    socket: Duplex,
    { head, onOpen }: { head: Buffer; onOpen: () => void },
  ): Promise<void> {
    const { services } = this;
    const [, image = '', disk = ''] = TARGET.exec(request.url ?? '') ?? [];
    const reader = this.authorize(request, image);
    const isUpgrade = request.method === 'GET' && request.headers.upgrade?.toLowerCase() === DISK_PROTOCOL;
    if (!isUpgrade) throw new MigrationError('NOT_FOUND', 'this address does not support that upgrade');
    if (this.open.size >= DISK_TUNNELS_MAX)
      throw new MigrationError('CONFLICT', `${DISK_TUNNELS_MAX} connections to disks are open`, { isRetryable: true });
    this.open.add(socket);
    socket.once('close', () => this.open.delete(socket));
    const remote = await services.agent.forks.openDisk(image, disk, reader);
    services.audit.note({
      ...{ who: `host/${reader}`, from: request.socket.remoteAddress ?? '' },
      ...{ what: 'openDisk', object: image, result: 'ok' },
    });
    if (socket.destroyed) return void remote.destroy();
    onOpen();
    if (request.socket instanceof TLSSocket) request.socket.setKeepAlive(true, KEEP_ALIVE_MS);
    remote.on('error', () => socket.destroy());
    remote.once('close', () => socket.destroy());
    socket.once('close', () => remote.destroy());
    socket.write(`HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ${DISK_PROTOCOL}\r\n\r\n`);
    if (head.length > 0) remote.write(head);
    socket.pipe(remote);
    remote.pipe(socket);
  }
}

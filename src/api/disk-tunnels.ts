/**
 * Serves disks of this host's images to hosts that joined their forks (src/api/peers/disk-tunnel.ts). Only hosts that
 * this one knows get a connection, by the name in their certificate. It leads to a process of the back end, which has
 * no key and no socket that others can reach.
 */
import type { IncomingMessage } from 'node:http';
import type { Duplex } from 'node:stream';
import { TLSSocket } from 'node:tls';
import { MigrationError } from '../domain/errors.js';
import { DISK_TUNNELS_MAX } from '../domain/host.js';
import { authorize } from './access.js';
import { refuse } from './console.js';
import type { ApiServices } from './contract/ports.js';
import { DISK_PROTOCOL, diskPath, KEEP_ALIVE_MS } from './peers/disk-tunnel.js';

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

  private async attach(
    request: IncomingMessage,
    socket: Duplex,
    { head, onOpen }: { head: Buffer; onOpen: () => void },
  ): Promise<void> {
    const { services } = this;
    authorize(request, 'host', services);
    const [, image = '', disk = ''] = TARGET.exec(request.url ?? '') ?? [];
    const reader = request.socket instanceof TLSSocket ? services.tls?.peerOf(request.socket) : null;
    const isUpgrade = request.method === 'GET' && request.headers.upgrade?.toLowerCase() === DISK_PROTOCOL;
    if (!isUpgrade || reader === null || reader === undefined)
      throw new MigrationError('NOT_FOUND', 'this address does not support that upgrade');
    if (this.open.size >= DISK_TUNNELS_MAX)
      throw new MigrationError('CONFLICT', `${DISK_TUNNELS_MAX} connections to disks are open`, { isRetryable: true });
    this.open.add(socket);
    socket.once('close', () => this.open.delete(socket));
    const remote = await services.agent.forks.openDisk(image, disk, reader.name);
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

/**
 * A VM's serial line over HTTP/1.1 Upgrade: after "101 Switching Protocols" the connection carries the line's bytes, both ways. QEMU serves one
 * reader at a time, so a new console takes the line over from an older one.
 */
import type { IncomingMessage } from 'node:http';
import { connect, type Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { MigrationError } from '../errors.js';
import { authorize } from './access.js';
import { apiError } from './http-errors.js';
import type { ApiServices } from './ports.js';

export const CONSOLE_PROTOCOL = 'vmigrate-console';
const PATH = /^\/v1\/vms\/([A-Za-z0-9._-]{1,64})\/console$/;

export class Consoles {
  private readonly open = new Map<string, Duplex>();

  constructor(private readonly services: ApiServices) {}

  /** For the `upgrade` event of a server. */
  handle(request: IncomingMessage, socket: Duplex, head: Buffer): void {
    socket.on('error', () => socket.destroy());
    try {
      authorize(request, this.services);
      const name = PATH.exec(request.url ?? '')?.[1];
      if (request.method !== 'GET' || name === undefined || request.headers.upgrade?.toLowerCase() !== CONSOLE_PROTOCOL)
        throw new MigrationError('NOT_FOUND', `nothing to upgrade to at ${request.url}`);
      this.attach(name, this.services.vms.consolePath(name), socket, head);
    } catch (error) {
      refuse(socket, error);
    }
  }

  close(): void {
    for (const socket of this.open.values()) socket.destroy();
  }

  private attach(name: string, path: string, socket: Duplex, head: Buffer): void {
    const line: Socket = connect(path);
    line.once('error', (cause) => {
      refuse(socket, new MigrationError('CONFLICT', `the serial line of ${name} cannot be opened`, { cause }));
    });
    line.once('connect', () => {
      line.removeAllListeners('error');
      line.on('error', () => socket.destroy());
      this.open.get(name)?.destroy();
      this.open.set(name, socket);
      socket.write(`HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ${CONSOLE_PROTOCOL}\r\n\r\n`);
      if (head.length > 0) line.write(head);
      socket.pipe(line);
      line.pipe(socket);
    });
    socket.once('close', () => {
      line.destroy();
      if (this.open.get(name) === socket) this.open.delete(name);
    });
    line.once('close', () => socket.end());
  }
}

function refuse(socket: Duplex, thrown: unknown): void {
  const { error, status } = apiError(thrown);
  const body = JSON.stringify(error.toJSON());
  const head = [`HTTP/1.1 ${status} Refused`, 'Connection: close', 'Content-Type: application/json'];
  socket.end(`${head.join('\r\n')}\r\nContent-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`);
}

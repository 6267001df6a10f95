/**
 * A VM's serial line over HTTP/1.1 Upgrade: after "101 Switching Protocols" the connection carries the bytes of the
 * line in both directions. With `?follow=false` it carries all output so far and then ends. That does not need QEMU,
 * which may be about to end.
 */
import type { IncomingMessage } from 'node:http';
import type { Duplex } from 'node:stream';
import type { Caller, Right } from '../domain/caller.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { authorize } from './access.js';
import { apiError } from './contract/http-errors.js';
import type { ApiServices } from './contract/ports.js';

const CONSOLE_PROTOCOL = 'vmigrate-console';
const CONSOLES_MAX = 64;
const WHAT = 'GET /v1/vms/:name/console';
const TARGET = /^\/v1\/vms\/([A-Za-z0-9._-]{1,64})\/console(?:\?backlog=(\d{1,6})|\?(follow=false))?$/;

export class Consoles {
  private readonly open = new Set<Duplex>();

  constructor(private readonly services: ApiServices) {}

  /** Handles the `upgrade` event of a server. It owns the socket from here on. */
  handle(request: IncomingMessage, socket: Duplex, head: Buffer): void {
    socket.on('error', () => socket.destroy());
    this.attach(request, socket, head).catch((error: unknown) => refuse(socket, error));
  }

  close(): void {
    for (const socket of this.open) socket.destroy();
  }

  #authorize(request: IncomingMessage, right: Right, vm: string | null): Caller {
    let known: Caller | null = null;
    try {
      return authorize(request, right, this.services, (caller) => {
        known = caller;
      });
    } catch (thrown) {
      const { code, message } = toMigrationError(thrown);
      const { name: who, from } = known ?? { name: 'unknown', from: request.socket.remoteAddress ?? '' };
      this.services.audit.note({ who, from, what: WHAT, object: vm, result: code, message });
      throw thrown;
    }
  }

  private async attach(request: IncomingMessage, socket: Duplex, head: Buffer): Promise<void> {
    const [, name, backlog, past] = TARGET.exec(request.url ?? '') ?? [];
    // What the line has said may be read by everybody who may look. Whoever types on it may do what the guest lets him.
    const isTyping = name !== undefined && past === undefined;
    const caller = this.#authorize(request, isTyping ? 'operator' : 'viewer', name ?? null);
    const protocol = request.headers.upgrade?.toLowerCase();
    if (request.method !== 'GET' || name === undefined || protocol !== CONSOLE_PROTOCOL)
      throw new MigrationError('NOT_FOUND', 'this address does not support upgrades');
    if (this.open.size >= CONSOLES_MAX) {
      throw new MigrationError('CONFLICT', `${CONSOLES_MAX} consoles and logs are open, and there may be no more`, {
        remedy: 'end some of the "vmctl console", "vmctl logs" and "vfork --wait --logs" that run, then try again',
      });
    }
    this.open.add(socket);
    socket.once('close', () => this.open.delete(socket));
    if (isTyping)
      this.services.audit.note({ who: caller.name, from: caller.from, what: WHAT, object: name, result: 'ok' });
    const line = await this.services.vms.openConsole(name, {
      backlogBytes: past === undefined ? Number(backlog ?? 0) : Number.MAX_SAFE_INTEGER,
      isFollowing: past === undefined,
    });
    if (socket.destroyed) {
      line.destroy();
      return;
    }
    line.on('error', () => socket.destroy());
    line.once('close', () => socket.end());
    socket.once('close', () => line.destroy());
    socket.write(`HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ${CONSOLE_PROTOCOL}\r\n\r\n`);
    if (head.length > 0) line.write(head);
    // The end of the input (of a pipe on the other side) does not end the output.
    socket.pipe(line, { end: false });
    line.pipe(socket);
  }
}

/** Answers a request for an upgrade with an error, and ends the connection. */
export function refuse(socket: Duplex, thrown: unknown): void {
  const { error, status } = apiError(thrown);
  const body = JSON.stringify(error.toJSON());
  const head = [`HTTP/1.1 ${status} Refused`, 'Connection: close', 'Content-Type: application/json'];
  socket.end(`${head.join('\r\n')}\r\nContent-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`);
}

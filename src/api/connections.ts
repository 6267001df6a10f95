/**
 * The connections of the daemon's servers. A stranger costs a bounded number of them for a bounded time: connections
 * whose TLS handshake is not over are few, from one address fewer, and the oldest gives way to a new one. Whoever has a
 * certificate has a budget of its own, so that no user keeps the hosts out.
 */
import type { Server } from 'node:http';
import type { Socket } from 'node:net';

export const CONNECTIONS_MAX = 512;
/** Handshakes under way, of all addresses and of one. Hosts behind one address share the latter. */
const HANDSHAKES_MAX = 128;
const HANDSHAKES_OF_ADDRESS_MAX = 32;
export const HANDSHAKE_TIMEOUT_MS = 5_000;
/** A stranger is an address. It has no certificate, and may have a token. */
const CONNECTIONS_OF_IDENTITY_MAX = { host: 96, user: 48, stranger: 16 } as const;
const STRANGERS_MAX = 64;
const CLOSE_GRACE_MS = 2_000;

export class Connections {
  readonly #server: Server;
  readonly #all = new Set<Socket>();
  /** In the order in which they came. */
  readonly #handshakes = new Set<Socket>();
  readonly #ofIdentity = new Map<string, number>();
  readonly #releases = new WeakMap<Socket, () => void>();
  #strangerCount = 0;

  /** `isTls`: connections count as strangers until `admit` is called for them. */
  constructor(server: Server, isTls: boolean, connectionsMax = CONNECTIONS_MAX) {
    this.#server = server;
    server.maxConnections = connectionsMax;
    server.on('connection', (socket: Socket) => this.#take(socket, isTls));
  }

  /**
   * The handshake on the connection from this address and port is over. Returns false if the identity has as many
   * connections as it may have; the caller then ends this one.
   */
  admit(secure: Socket, identity: { role: keyof typeof CONNECTIONS_OF_IDENTITY_MAX; name: string }): boolean {
    const { remoteAddress, remotePort } = secure;
    for (const socket of this.#handshakes)
      if (socket.remotePort === remotePort && socket.remoteAddress === remoteAddress) this.#handshakes.delete(socket);
    const key = `${identity.role}/${identity.name}`;
    const count = this.#ofIdentity.get(key) ?? 0;
    if (count >= CONNECTIONS_OF_IDENTITY_MAX[identity.role]) return false;
    const isStranger = identity.role === 'stranger';
    if (isStranger && this.#strangerCount >= STRANGERS_MAX) return false;
    if (isStranger) this.#strangerCount++;
    this.#ofIdentity.set(key, count + 1);
    this.#releases.set(secure, () => {
      if (isStranger) this.#strangerCount--;
      const left = (this.#ofIdentity.get(key) ?? 1) - 1;
      if (left === 0) this.#ofIdentity.delete(key);
      else this.#ofIdentity.set(key, left);
    });
    secure.once('close', () => this.release(secure));
    return true;
  }

  /** The connection no longer counts for its identity: it carries no more requests. Idempotent. */
  release(secure: Socket): void {
    this.#releases.get(secure)?.();
    this.#releases.delete(secure);
  }

  /** Stops listening. Running requests have a moment to finish; nothing that the other side does delays the end. */
  close(): Promise<void> {
    return new Promise((resolve) => {
      const force = setTimeout(() => this.#destroy(this.#all), CLOSE_GRACE_MS);
      this.#server.close(() => {
        clearTimeout(force);
        resolve();
      });
      this.#destroy(this.#handshakes);
      this.#server.closeIdleConnections();
    });
  }

  #take(socket: Socket, isTls: boolean): void {
    this.#all.add(socket);
    socket.once('close', () => {
      this.#all.delete(socket);
      this.#handshakes.delete(socket);
    });
    if (!isTls) return;
    const { remoteAddress } = socket;
    const ofAddress = [...this.#handshakes].filter((other) => other.remoteAddress === remoteAddress);
    const oldest = ofAddress.length >= HANDSHAKES_OF_ADDRESS_MAX ? ofAddress[0] : undefined;
    const [first] = this.#handshakes;
    const displaced = oldest ?? (this.#handshakes.size >= HANDSHAKES_MAX ? first : undefined);
    this.#handshakes.add(socket);
    if (displaced === undefined) return;
    this.#handshakes.delete(displaced);
    displaced.destroy();
  }

  #destroy(sockets: ReadonlySet<Socket>): void {
    for (const socket of [...sockets]) socket.destroy();
  }
}

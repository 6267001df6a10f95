/**
 * The connections of the daemon's servers. A stranger costs a bounded number of them for a bounded time: connections
 * whose TLS handshake is not over, or that have shown neither certificate nor token, are few, from one address fewer,
 * and the oldest gives way to a new one. Whoever is known has a budget of its own, so that no user keeps the hosts out.
 */
import type { Server } from 'node:http';
import type { Socket } from 'node:net';

export const CONNECTIONS_MAX = 512;
/** Handshakes under way, of all addresses and of one. Hosts behind one address share the latter. */
const HANDSHAKES_MAX = 128;
const HANDSHAKES_OF_ADDRESS_MAX = 32;
export const HANDSHAKE_TIMEOUT_MS = 5_000;
const CONNECTIONS_OF_IDENTITY_MAX = { host: 96, user: 48 } as const;
/** Connections without a certificate that have not shown a token yet, of all addresses and of one. */
const STRANGERS_MAX = 64;
const STRANGERS_OF_ADDRESS_MAX = 16;
const CLOSE_GRACE_MS = 2_000;

export class Connections {
  readonly #server: Server;
  readonly #all = new Set<Socket>();
  /** In the order in which they came. */
  readonly #handshakes = new Set<Socket>();
  /** Whoever has no certificate and has not shown a token, in the order in which they came. */
  readonly #strangers = new Set<Socket>();
  readonly #ofIdentity = new Map<string, number>();
  readonly #releases = new WeakMap<Socket, () => void>();

  /** `isTls`: connections are handshakes until `admit` or `admitStranger` is called for them. */
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
    this.#endHandshake(secure);
    const key = `${identity.role}/${identity.name}`;
    const count = this.#ofIdentity.get(key) ?? 0;
    if (count >= CONNECTIONS_OF_IDENTITY_MAX[identity.role]) return false;
    this.#ofIdentity.set(key, count + 1);
    this.#releases.set(secure, () => {
      const left = (this.#ofIdentity.get(key) ?? 1) - 1;
      if (left === 0) this.#ofIdentity.delete(key);
      else this.#ofIdentity.set(key, left);
    });
    secure.once('close', () => this.release(secure));
    return true;
  }

  /** The handshake is over, and has shown no certificate. The oldest stranger, of this address if it has many, goes. */
  admitStranger(secure: Socket): void {
    this.#endHandshake(secure);
    const limits = { all: STRANGERS_MAX, ofAddress: STRANGERS_OF_ADDRESS_MAX };
    giveWay(this.#strangers, secure, limits);
    serverOf.set(secure, this);
    secure.once('close', () => this.#strangers.delete(secure));
  }

  /** See `identify`. */
  identify(secure: Socket, name: string): boolean {
    return !this.#strangers.delete(secure) || this.admit(secure, { role: 'user', name });
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
    giveWay(this.#handshakes, socket, { all: HANDSHAKES_MAX, ofAddress: HANDSHAKES_OF_ADDRESS_MAX });
  }

  /** Node has another object for the connection below TLS. */
  #endHandshake({ remoteAddress, remotePort }: Socket): void {
    for (const socket of this.#handshakes)
      if (socket.remotePort === remotePort && socket.remoteAddress === remoteAddress) this.#handshakes.delete(socket);
  }

  #destroy(sockets: ReadonlySet<Socket>): void {
    for (const socket of [...sockets]) socket.destroy();
  }
}

/** The server of a connection that has shown no certificate. */
const serverOf = new WeakMap<Socket, Connections>();

/**
 * A request on the connection has shown the token `name`, so that it does not give way to strangers any more. Returns
 * false if the token has as many connections as it may have. Does nothing for connections that are known otherwise.
 */
export function identify(secure: Socket, name: string): boolean {
  return serverOf.get(secure)?.identify(secure, name) ?? true;
}

/** Adds a connection to those that are in the order in which they came, and ends one that is too many. */
function giveWay(
  sockets: Set<Socket>,
  socket: Socket,
  max: { readonly all: number; readonly ofAddress: number },
): void {
  const ofAddress = [...sockets].filter(({ remoteAddress }) => remoteAddress === socket.remoteAddress);
  const oldest = ofAddress.length >= max.ofAddress ? ofAddress[0] : undefined;
  const [first] = sockets;
  const displaced = oldest ?? (sockets.size >= max.all ? first : undefined);
  sockets.add(socket);
  if (displaced === undefined) return;
  sockets.delete(displaced);
  displaced.destroy();
}

/**
 * The client for the agents of other hosts, over https with mutual TLS 1.3. A peer is identified by its name, not by
 * its address: its certificate must be that of the called host. Connections are kept alive and can be opened
 * beforehand, so that a call in the blackout costs one round trip.
 */
import { Agent, request as httpsRequest, type RequestOptions } from 'node:https';
import type { Duplex, Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import type { TLSSocket } from 'node:tls';
import type { ZodType } from 'zod';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { LoadClonesReply } from '../../engine/ports/fork.js';
import type { HostPort } from '../../engine/ports/host.js';
import { parseKeepingUnknown } from '../../kit/unknown-keys.js';
import { checkHostIdentity } from '../../tls/identity.js';
import type { TlsStore } from '../../tls/store.js';
import { describeIssues } from '../contract/http-errors.js';
import type { ApiAgent, ApiPeers } from '../contract/ports.js';
import { openStream, readAnswer } from './answer.js';
import { CLONES_MS, hostOfCalls } from './methods.js';
import { connectionError, noConnection, withOwnCertificate } from './peer-errors.js';
import { callPath, forkStatePath, OCTETS, PING_PATH, serialPath, statePath } from './routes.js';
import { loadClonesReply } from './schemas.js';
import { diskEnd, openTunnel, streamEnd, type TunnelEnd } from './tunnel.js';

/** Less than a ping may take, so that its error says why there is no connection. */
const CONNECT_MS = 4_000;
const PING_MS = 5_000;
/**
 * How long some calls may stay without answer before it is asked whether the host is there at all: questions of
 * pre-flight, and the calls of a fork for which all of its other hosts wait.
 */
const SILENT_MS = 3_000;
const WATCHED_PATHS: ReadonlySet<string> = new Set([
  ...['inventory', 'checkTarget', 'connectImage', 'loadClones'].map(callPath),
]);
const STATE_MS = 600_000;
/** Of a serial log a host keeps some MiB. */
const SERIAL_BYTES_MAX = 64 * 2 ** 20;
/** Shorter than the server's limit for idle connections (server.ts). */
const IDLE_MS = 60_000;
/** The connections that a switchover uses at once: for the device state, the wait for it, the resume, and a spare. */
const WARM_CONNECTIONS = 4;
const CONNECTIONS_MAX = 32;

interface Call {
  readonly path: string;
  readonly method: 'POST' | 'PUT';
  readonly body: string | Readable;
  readonly timeoutMs: number;
  /** It is asked whether the host is there if it stays silent. Absent: the path tells. */
  readonly isWatched?: boolean;
}

/** The connections to one host. */
class PeerConnections {
  private agent: Agent;
  /** Those of streams, which have a connection each: whoever reads one may be slow. */
  private readonly ofStreams = new Set<Agent>();

  constructor(
    readonly host: string,
    readonly url: string,
    private readonly store: TlsStore,
  ) {
    this.agent = this.newAgent();
  }

  private newAgent(): Agent {
    return new Agent({
      ...this.store.options(),
      keepAlive: true,
      maxSockets: CONNECTIONS_MAX,
      maxFreeSockets: WARM_CONNECTIONS,
      timeout: IDLE_MS,
      scheduling: 'lifo',
      // A resumed TLS session would not check the peer's certificate again.
      maxCachedSessions: 0,
      checkServerIdentity: checkHostIdentity(this.host),
    });
  }

  /**
   * Applies new certificates or revocations. It closes all idle connections, and each busy one whose peer no longer has
   * a valid certificate of the cluster.
   */
  renew(): void {
    const old = this.agent;
    this.agent = this.newAgent();
    for (const socket of Object.values(old.freeSockets).flat()) socket?.destroy();
    const busy = [old, ...this.ofStreams].flatMap(({ sockets }) => Object.values(sockets).flat());
    for (const socket of busy)
      if (socket !== undefined && this.store.peerOf(socket as TLSSocket) === null) socket.destroy();
  }

  close(): void {
    this.agent.destroy();
    for (const agent of this.ofStreams) agent.destroy();
  }

  async stream(path: string, bytesMax: number): Promise<Readable> {
    const agent = this.newAgent();
    const end = (): void => {
      this.ofStreams.delete(agent);
      agent.destroy();
    };
    this.ofStreams.add(agent);
    try {
      const { host, url } = this;
      return (await openStream({ agent, where: `host ${host}`, url, path, bytesMax })).once('close', end);
    } catch (error) {
      end();
      throw error;
    }
  }

  /**
   * Returns the `result` of the peer's answer. If the peer had closed the idle connection, the call is repeated once on
   * a new one.
   */
  async call(call: Call): Promise<unknown> {
    try {
      return await this.attempt(call);
    } catch (error) {
      if (!(error instanceof StaleConnection) || typeof call.body !== 'string') throw unwrap(error);
    }
    // The other idle connections are as old as this one, so they are probably closed too.
    for (const socket of Object.values(this.agent.freeSockets).flat()) socket?.destroy();
    return this.attempt(call).catch((error: unknown) => {
      throw unwrap(error);
    });
  }

  /** An empty call on a connection of its own, so that both hosts check each other's certificate now. */
  async check(timeoutMs: number): Promise<void> {
    const agent = this.newAgent();
    try {
      await this.attempt({ path: PING_PATH, method: 'POST', body: '[]', timeoutMs }, agent);
    } catch (error) {
      throw unwrap(error);
    } finally {
      agent.destroy();
    }
  }

  private async attempt(call: Call, agent = this.agent): Promise<unknown> {
    const { path, method, body, timeoutMs, isWatched = WATCHED_PATHS.has(path) } = call;
    const where = `host ${this.host}`;
    const isStream = typeof body !== 'string';
    const options: RequestOptions = {
      agent,
      method,
      headers: isStream
        ? { 'content-type': OCTETS }
        : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) },
    };
    return new Promise((resolve, reject) => {
      const request = httpsRequest(new URL(path, this.url), options, (response) => {
        readAnswer(response, where)
          .then(resolve, reject)
          .finally(() => {
            finish();
            // An answer before the whole body was sent is a refusal. The body's stream is destroyed with the request.
            if (!request.writableFinished) request.destroy();
          });
      });
      const deadline = setTimeout(() => {
        request.destroy(
          new MigrationError('TIMEOUT', `${where} did not answer within ${timeoutMs} ms`, { isRetryable: true }),
        );
      }, timeoutMs);
      let connecting: NodeJS.Timeout | undefined;
      let silent: NodeJS.Timeout | undefined;
      const finish = (): void => {
        clearTimeout(deadline);
        clearTimeout(connecting);
        clearTimeout(silent);
      };
      // Nothing tells that the host at the other end of an idle connection is gone, except that no new one can be made.
      const checkHost = (): void => {
        this.check(SILENT_MS).catch(() => {
          request.destroy(
            new MigrationError('UNREACHABLE', `${where} (${this.url}) does not answer any more`, { isRetryable: true }),
          );
        });
      };
      request.on('socket', (socket) => {
        // The agent's idle limit must not end a call that waits for its answer.
        socket.setTimeout(0);
        // Agent's `noDelay` does not reach TLS sockets. Without this, a call in the blackout would wait 40 ms for the
        // peer's delayed acknowledgement.
        (socket as TLSSocket).setNoDelay(true);
        if (!socket.connecting) {
          if (isWatched) silent = setTimeout(checkHost, SILENT_MS);
          return;
        }
        connecting = setTimeout(() => {
          request.destroy(noConnection(`${where} (${this.url})`, !socket.connecting));
        }, CONNECT_MS);
        socket.once('secureConnect', () => clearTimeout(connecting));
      });
      request.on('error', (error: NodeJS.ErrnoException) => {
        finish();
        const known = connectionError(error, where, this.url);
        reject(request.reusedSocket && error.code === 'ECONNRESET' ? new StaleConnection(known) : known);
      });
      if (isStream) {
        request.flushHeaders();
        pipeline(body, request).catch((error: unknown) => {
          // This is for a body that fails. An answer before the end of the body (a refusal) is reported elsewhere.
          if (!request.destroyed) request.destroy(error as Error);
        });
      } else {
        request.end(body);
      }
    });
  }
}

class StaleConnection extends Error {
  constructor(readonly known: MigrationError) {
    super(known.message);
  }
}

function unwrap(error: unknown): unknown {
  return error instanceof StaleConnection ? error.known : error;
}

export interface RemoteAgentsOptions {
  readonly self: string;
  /**
   * The local agent, for calls to this host's own name. It is a function because the local agent itself needs the
   * peers.
   */
  readonly local: () => ApiAgent;
  readonly peers: Readonly<Record<string, string>>;
  /** Null if there is no TLS folder. Then no peer can be called. */
  readonly store: TlsStore | null;
}

/** All hosts that this host may call. */
export class RemoteAgents implements ApiPeers {
  private readonly connections = new Map<string, PeerConnections>();
  private readonly ports = new Map<string, HostPort>();
  private readonly tunnels = new Set<TLSSocket>();
  private readonly unsubscribe: () => void;

  constructor(private readonly options: RemoteAgentsOptions) {
    const { store } = options;
    for (const [host, url] of Object.entries(options.peers)) {
      if (store === null || host === options.self) continue;
      const connections = new PeerConnections(host, url, store);
      this.connections.set(host, connections);
      this.ports.set(host, remoteHost(host, connections));
    }
    this.unsubscribe = store?.onChange(() => this.renew()) ?? (() => undefined);
  }

  get names(): readonly string[] {
    return [...this.connections.keys()];
  }

  /** A host of the configuration is a peer also if this host lacks a certificate to call it. */
  isPeer(host: string): boolean {
    const { self, peers } = this.options;
    return host === self || Object.hasOwn(peers, host);
  }

  url(host: string): string {
    return this.peer(host).url;
  }

  agent(host: string): HostPort {
    if (host === this.options.self) return this.options.local();
    this.peer(host);
    return this.ports.get(host) as HostPort;
  }

  /** Resolves when the target's QEMU has loaded the state. */
  async sendState(host: string, session: string, body: Readable): Promise<void> {
    if (host === this.options.self) return this.options.local().target.acceptState(session, body);
    await this.peer(host).call({ path: statePath(session), method: 'PUT', body, timeoutMs: STATE_MS });
  }

  async sendForkState(host: string, fork: string, body: Readable): Promise<LoadClonesReply> {
    if (host === this.options.self) return this.options.local().forks.acceptForkState(fork, body);
    const path = forkStatePath(fork);
    const call = { path, method: 'PUT', body, timeoutMs: CLONES_MS, isWatched: true } as const;
    return checked(host, 'the fork state', loadClonesReply, await this.peer(host).call(call));
  }

  /** The serial output that another host keeps of a VM. */
  async serialLog(host: string, vm: string): Promise<Readable> {
    return this.peer(host).stream(serialPath(vm), SERIAL_BYTES_MAX);
  }

  /** The connection is not one of those for calls: it may last as long as a VM. */
  async openDisk(host: string, image: string, disk: string): Promise<Duplex> {
    const { self, local } = this.options;
    return host === self ? local().forks.openDisk(image, disk, self) : this.tunnel(host, diskEnd(image, disk));
  }

  async openStream(host: string, session: string): Promise<Duplex> {
    const { self, local } = this.options;
    return host === self ? local().target.openStream(session) : this.tunnel(host, streamEnd(session));
  }

  private async tunnel(host: string, end: TunnelEnd): Promise<Duplex> {
    const { url } = this.peer(host);
    const tunnel = await openTunnel({ ...end, host, url, tls: this.options.store?.options() ?? {} });
    this.tunnels.add(tunnel);
    tunnel.once('close', () => this.tunnels.delete(tunnel));
    return tunnel;
  }

  /** Opens as many connections as a switchover needs at once. */
  async warm(host: string): Promise<void> {
    if (host === this.options.self) return;
    await Promise.all(Array.from({ length: WARM_CONNECTIONS }, () => this.ping(host)));
  }

  async ping(host: string): Promise<{ roundTripMs: number }> {
    const startedMs = performance.now();
    await this.peer(host).call({ path: PING_PATH, method: 'POST', body: '[]', timeoutMs: PING_MS });
    return { roundTripMs: performance.now() - startedMs };
  }

  /** Throws UNAUTHENTICATED if one of the two hosts does not accept the other's certificate now. */
  async check(host: string): Promise<{ roundTripMs: number }> {
    const peer = this.peer(host);
    try {
      await peer.check(PING_MS);
    } catch (error) {
      throw withOwnCertificate(toMigrationError(error), this.options.store);
    }
    return this.ping(host);
  }

  close(): void {
    this.unsubscribe();
    for (const connections of this.connections.values()) connections.close();
    for (const tunnel of this.tunnels) tunnel.destroy();
  }

  private renew(): void {
    for (const connections of this.connections.values()) connections.renew();
    for (const tunnel of this.tunnels) if (this.options.store?.peerOf(tunnel) === null) tunnel.destroy();
  }

  private peer(host: string): PeerConnections {
    const connections = this.connections.get(host);
    if (connections !== undefined) return connections;
    throw new MigrationError('NOT_FOUND', `host ${this.options.self} does not know a host ${host}`, {
      remedy: `add it to the daemon's configuration: --peer ${host}=https://ADDRESS:PORT`,
    });
  }
}

function remoteHost(host: string, connections: PeerConnections): HostPort {
  return hostOfCalls(host, async ({ name, result, timeoutMs }, args) => {
    const answer = await connections.call({
      path: callPath(name),
      method: 'POST',
      body: JSON.stringify(args),
      timeoutMs,
    });
    return checked(host, name, result, answer) ?? undefined;
  });
}

function checked<T>(host: string, name: string, schema: ZodType<T>, answer: unknown): T {
  const result = parseKeepingUnknown(schema, answer);
  if (result.success) return result.data;
  throw new MigrationError(
    'PEER_PROTOCOL',
    `the response of host ${host} does not match the schema of ${name}: ${describeIssues(result.error, name)}`,
  );
}

/**
 * The daemon's HTTP server: one router, served on a unix socket (clients on this machine) and on https with TLS 1.3
 * (other hosts, and clients with a certificate or a token). access.ts checks the caller of each request.
 */
import { chmod, chown, unlink } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import { type AddressInfo, connect, type Socket } from 'node:net';
import type { TLSSocket } from 'node:tls';
import { type FastifyInstance, type FastifyReply, type FastifyRequest, fastify } from 'fastify';
import type { Caller, Right } from '../domain/caller.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { DISK_TUNNELS_MAX, STREAM_TUNNELS_MAX } from '../domain/host.js';
import { makeSocketDirectory } from '../kit/directory.js';
import { LogLimit } from '../kit/log-limit.js';
import type { TlsStore } from '../tls/store.js';
import { authorize, HOST_ROUTES } from './access.js';
import { auditOf } from './audit.js';
import { CONNECTIONS_MAX, Connections, HANDSHAKE_TIMEOUT_MS } from './connections.js';
import { Consoles } from './console.js';
import { apiError, check } from './contract/http-errors.js';
import type { ApiServices } from './contract/ports.js';
import { agentRoutes, OCTETS, STATE_ROUTES } from './peers/routes.js';
import { EventStreams } from './public/events.js';
import { Metrics } from './public/metrics.js';
import { publicRoutes, YAML } from './public/routes.js';
import { Tunnels } from './tunnels.js';

const BODY_BYTES_MAX = 2 ** 20;
const HEADERS_TIMEOUT_MS = 10_000;
/** Longer than clients keep an idle connection, so that no request meets a connection that the server is closing. */
const KEEP_ALIVE_MS = 75_000;
/** A request other than that with a device state must have arrived by then. */
const BODY_TIMEOUT_MS = 30_000;

export interface ApiServer {
  readonly app: FastifyInstance;
  /** `groupId`: the members of this group may connect, too. */
  listenUnix(path: string, groupId?: number): Promise<void>;
  /** Returns the port, which the kernel chooses for port 0. */
  listenTls(address: string, port: number, store: TlsStore): Promise<number>;
  /** Stops listening, ends event streams and consoles, and gives running requests a moment to finish. */
  close(): Promise<void>;
}

export function buildServer(services: ApiServices): ApiServer {
  let refusedCount = 0;
  const limit = new LogLimit();
  const refused = (details: object): void => {
    refusedCount++;
    limit.log((omitted) => services.log.warn({ ...details, ...omitted }, 'refused a connection'));
  };
  const app = buildApp(services, () => refusedCount);
  const consoles = new Consoles(services);
  const tunnels = new Tunnels(services);
  const servers: Connections[] = [];
  const closers: (() => void)[] = [];

  const prepare = (server: Server, isTls: boolean): Connections => {
    server.keepAliveTimeout = KEEP_ALIVE_MS;
    server.headersTimeout = HEADERS_TIMEOUT_MS;
    // The transfer of a device state may take as long as its migration. buildApp limits all other requests.
    server.requestTimeout = 0;
    const connections = new Connections(
      server,
      isTls,
      CONNECTIONS_MAX + (isTls ? DISK_TUNNELS_MAX + STREAM_TUNNELS_MAX : 0),
    );
    server.on('upgrade', (request, socket, head) => {
      if (!Tunnels.isFor(request)) return consoles.handle(request, socket, head);
      tunnels.handle(request, socket, head, () => connections.release(request.socket));
    });
    // After listening, this event means that accept() failed, for example for want of descriptors. The next call may
    // succeed.
    server.on('error', (err) => services.log.error({ err }, 'cannot accept connections'));
    servers.push(connections);
    return connections;
  };

  return {
    app: app.fastify,
    async listenUnix(path, groupId) {
      await makeSocketDirectory(path);
      await removeStaleSocket(path);
      await app.fastify.ready();
      const server = createServer((request, response) => app.fastify.routing(request, response));
      const connections = prepare(server, false);
      server.on('connection', (socket) => {
        const problem = localProblem(socket, connections, services);
        if (problem === null) return;
        refused({ peer: 'unix socket', reason: problem });
        socket.destroy();
      });
      await listen(server, { path });
      if (groupId !== undefined) await chown(path, process.geteuid?.() ?? 0, groupId);
      await chmod(path, groupId === undefined ? 0o600 : 0o660);
    },
    async listenTls(address, port, store) {
      await app.fastify.ready();
      // A client with a token has no certificate. Whoever has neither is refused below, before its first request.
      const options = { ...store.options(), rejectUnauthorized: false, handshakeTimeout: HANDSHAKE_TIMEOUT_MS };
      const server = createTlsServer(options, (request, response) => app.fastify.routing(request, response));
      const connections = prepare(server, true);
      const sockets = new Set<TLSSocket>();
      server.on('secureConnection', (socket) => {
        const identity = store.peerOf(socket);
        const peer = socket.remoteAddress ?? '';
        const reason = identity === null ? strangersProblem(socket, services) : null;
        const isAdmitted = identity === null || connections.admit(socket, identity);
        if (identity === null && reason === null) connections.admitStranger(socket);
        if (reason !== null || !isAdmitted) {
          refused({ peer, ...identity, reason: reason ?? 'it has too many connections' });
          socket.destroy();
          return;
        }
        socket.setNoDelay(true);
        sockets.add(socket);
        socket.once('close', () => sockets.delete(socket));
      });
      server.on('tlsClientError', (error: NodeJS.ErrnoException, socket: TLSSocket) => {
        refused({ peer: socket.remoteAddress, reason: error.code ?? error.message });
      });
      // All clients with a token lose their connections, with what they follow on them, and may make new ones.
      const closeOthers = (): void => {
        for (const socket of sockets) if (store.peerOf(socket) === null) socket.destroy();
      };
      closers.push(services.tokens.onRevoked(closeOthers));
      closers.push(
        store.onChange(() => {
          server.setSecureContext(store.options());
          closeOthers();
          services.log.info({ directory: store.directory }, 'loaded new certificates or a new revocation list');
        }),
      );
      await listen(server, { host: address, port });
      return (server.address() as AddressInfo).port;
    },
    async close() {
      for (const close of closers) close();
      app.close();
      consoles.close();
      tunnels.close();
      await Promise.all(servers.map((connections) => connections.close()));
      await app.fastify.close();
    },
  };
}

function buildApp(services: ApiServices, refusedCount: () => number): { fastify: FastifyInstance; close: () => void } {
  const metrics = new Metrics(services, refusedCount);
  const streams = new EventStreams();
  const fail = (thrown: unknown, request: FastifyRequest, reply: FastifyReply): FastifyReply => {
    const { error, status } = apiError(thrown);
    if (error.code === 'INTERNAL')
      services.log.error({ err: thrown, url: request.url }, 'internal error: a bug in vmigrated');
    // A stranger has one request on a connection, also if it fails before he is asked who he is.
    if ((request.caller ?? null) === null) void reply.header('connection', 'close');
    request.failure = error;
    return reply.code(status).type('application/json').send(error.toJSON());
  };
  const app = fastify({
    bodyLimit: BODY_BYTES_MAX,
    logger: false,
    exposeHeadRoutes: false,
    forceCloseConnections: false,
    // Handles failures before routing, such as a URL that cannot be decoded.
    frameworkErrors: (error, request, reply) => void fail(error, request as FastifyRequest, reply as FastifyReply),
  });
  app.setValidatorCompiler(({ schema, httpPart }) => (input: unknown) => {
    try {
      return { value: check(schema as Parameters<typeof check>[0], input, httpPart ?? 'request') };
    } catch (error) {
      return { error: error as MigrationError };
    }
  });
  // Answers are not validated: the compiler checks them here, and the receiver checks them again.
  app.setSerializerCompiler(() => JSON.stringify);
  app.addContentTypeParser(YAML, { parseAs: 'string' }, (_, body, done) => done(null, body));
  app.addContentTypeParser(OCTETS, (request, payload, done) => {
    if (request.routeOptions.url?.startsWith(HOST_ROUTES) === true) done(null, payload);
    else done(new MigrationError('USAGE', `${OCTETS} is accepted for device states only`));
  });

  app.decorateRequest('caller', null);
  app.decorateRequest('auditObject', null);
  app.decorateRequest('hostCall', null);
  app.addHook('onRequest', async (request, reply) => {
    if (!STATE_ROUTES.has(request.routeOptions.url ?? '')) limitBody(request, reply);
    // Whoever hangs up before the answer has changed something all the same.
    reply.raw.once('close', () => {
      const entry = auditOf(request, reply.raw.writableFinished ? reply.statusCode : null);
      if (entry !== null) services.audit.note(entry);
    });
    authorize(request.raw, rightFor(request), services, (caller) => {
      request.caller = caller;
    });
  });
  app.setErrorHandler(fail);
  app.setNotFoundHandler((request, reply) => {
    const error = new MigrationError('NOT_FOUND', `no route ${request.method} ${request.url.slice(0, 200)}`);
    return reply.code(404).send(error.toJSON());
  });

  const addRoutes = (target: FastifyInstance): void => {
    publicRoutes(target, services, metrics, streams);
    agentRoutes(target, services);
  };
  addRoutes(app);
  let document: Promise<object> | null = null;
  app.get('/openapi.json', async () => {
    const { openApiDocument } = await import('./openapi.js');
    document ??= openApiDocument(services.version, addRoutes);
    return document;
  });
  const close = (): void => {
    metrics.close();
    streams.close();
  };
  return { fastify: app, close };
}

/** What a route needs: what it says itself, or else by its address and method. */
function rightFor({ routeOptions, method }: FastifyRequest): Right {
  if (routeOptions.url?.startsWith(HOST_ROUTES) === true) return 'host';
  return (routeOptions.config as { right?: Right }).right ?? (method === 'GET' ? 'viewer' : 'operator');
}

/** Why a connection on the unix socket is refused, or null. Administrators may have as many as there are. */
function localProblem(socket: Socket, connections: Connections, { localCaller }: ApiServices): string | null {
  try {
    const { name, role } = localCaller(socket);
    const isAdmitted = role === 'admin' || connections.admit(socket, { role: 'user', name });
    return isAdmitted ? null : `${name} has too many connections`;
  } catch (error) {
    return toMigrationError(error).message;
  }
}

/** Why a connection without the certificate of a host or user of this cluster is of no use here, or null. */
function strangersProblem(socket: TLSSocket, { tokens }: ApiServices): string | null {
  // Whoever shows a certificate is not asked for a token: the certificate is wrong, revoked or has expired.
  const hasCertificate = Object.keys(socket.getPeerCertificate() ?? {}).length > 0;
  if (hasCertificate) return String(socket.authorizationError ?? 'the certificate has expired or is revoked');
  return tokens.isAnyValid ? null : 'it has no certificate, and this host has no valid tokens';
}

declare module 'fastify' {
  interface FastifyRequest {
    /** Null until the caller is known. */
    caller: Caller | null;
    /** What a request is about that its address does not name, for the audit log. */
    auditObject: string | null;
    /** Null if it is no call of another host, or not known yet to be one. */
    hostCall: { readonly name: string; readonly isChange: boolean } | null;
    failure?: MigrationError;
  }
}

/** Ends the connection of a request whose body does not arrive. */
function limitBody({ raw }: FastifyRequest, reply: FastifyReply): void {
  const timer = setTimeout(() => {
    if (!raw.complete) raw.socket.destroy();
  }, BODY_TIMEOUT_MS);
  timer.unref();
  const clear = (): void => clearTimeout(timer);
  raw.once('end', clear);
  reply.raw.once('close', clear);
}

function listen(server: Server, where: { path: string } | { host: string; port: number }): Promise<void> {
  return new Promise((resolve, reject) => {
    const onError = (cause: NodeJS.ErrnoException): void => {
      const place = 'path' in where ? where.path : `${where.host}:${where.port}`;
      reject(new MigrationError('CONFLICT', `cannot listen on ${place}: ${cause.code ?? cause.message}`, { cause }));
    };
    server.once('error', onError);
    server.listen(where, () => {
      server.off('error', onError);
      resolve();
    });
  });
}

/** Removes the socket file of a killed daemon. Throws CONFLICT if another daemon answers on it. */
async function removeStaleSocket(path: string): Promise<void> {
  const isAlive = await new Promise<boolean>((resolve) => {
    const probe: Socket = connect(path, () => {
      probe.destroy();
      resolve(true);
    });
    probe.once('error', () => resolve(false));
  });
  if (isAlive) throw new MigrationError('CONFLICT', `another daemon serves ${path}`);
  await unlink(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT')
      throw new MigrationError('CONFLICT', `cannot use ${path}: ${error.code}`, { cause: error });
  });
}

/**
 * The client of the API for the commands: over the daemon's unix socket, or over https with a client certificate. It is
 * small on purpose, because every command loads it: it needs no package, and loads TLS only if it is used.
 */
import type { X509Certificate as X509CertificateType } from 'node:crypto';
import { type ClientRequest, request as httpRequest, type IncomingMessage, type RequestOptions } from 'node:http';
import type { Socket } from 'node:net';
import { type Duplex, PassThrough, type Readable } from 'node:stream';
import { MigrationError } from '../domain/errors.js';
import type { JobView } from '../domain/job.js';
import type { VmEvent } from '../domain/vm-event.js';

export const DEFAULT_HOST = 'unix:/run/vmigrate/api.sock';
const CONNECT_MS = 5_000;
/**
 * A question is answered by then, also one that the daemon passes on to peers. A request that changes something may
 * take as long as what it does.
 */
const ANSWER_MS_MAX = 120_000;
/** The daemon writes to an event stream every 15 s. */
const SILENCE_MS_MAX = 60_000;
const KEEP_ALIVE_MS = 15_000;
const ANSWER_BYTES_MAX = 64 * 2 ** 20;
/** Enough for the view of a fork of CLONES_MAX clones that all failed, each with its causes. */
const EVENT_BYTES_MAX = 16 * 2 ** 20;
const CONSOLE_PROTOCOL = 'vmigrate-console';

export interface ClientOptions {
  /** unix:PATH or https://ADDRESS:PORT */
  readonly host: string;
  /** Folder with ca.pem, cert.pem and key.pem for https. */
  readonly tls: string | null;
  /** A token of that host, instead of a certificate. The folder then needs ca.pem and crl.pem only. */
  readonly token?: string | null;
  /** For tests: how long a question may stay unanswered, and an event stream silent. */
  readonly answerMsMax?: number;
  readonly silenceMsMax?: number;
}

interface SendOptions {
  readonly method: string;
  readonly path: string;
  readonly headers?: Record<string, string>;
  readonly body?: string;
}

const START_REMEDY = 'start vmigrated, or give its address with --host or VMIGRATE_HOST';

/** The daemon itself does not answer. UNREACHABLE in the daemon's answer is about another host. */
export class DaemonUnreachable extends MigrationError {
  constructor(message: string, cause: unknown, remedy = START_REMEDY) {
    super('UNREACHABLE', message, { remedy, cause });
  }
}

/** The daemon has taken the connection, and is silent since. */
class Silence extends Error {}

function silentFor(ms: number): Silence {
  return new Silence(`has taken the connection, but has been silent for ${ms / 1000} s`);
}

/** Says which of the causes it is: no right to the socket, a certificate that is refused, or nobody listening. */
export function unreachable({ host, tls }: ClientOptions, cause: NodeJS.ErrnoException): DaemonUnreachable {
  const reason = cause.code ?? cause.message;
  if (cause instanceof Silence)
    return new DaemonUnreachable(
      `the daemon at ${host} ${cause.message}`,
      undefined,
      'it may be stopped or very busy: look at its process and at its log; restarting it leaves the VMs running',
    );
  if (host.startsWith('unix:') && (reason === 'EACCES' || reason === 'EPERM'))
    return new DaemonUnreachable(
      `this user may not use the daemon's socket ${host.slice('unix:'.length)}`,
      cause,
      'run the command as root, or join the group that security.socketGroup of the daemon names, or use https with a ' +
        'certificate: vmctl certs user NAME',
    );
  if (CERTIFICATE_ERROR.test(reason))
    return new DaemonUnreachable(
      `the certificate of the daemon at ${host} is not accepted here: ${reason}`,
      cause,
      `look at both with vmctl certs show --dir ${tls ?? 'DIR'}, and compare the clocks of both machines (date)`,
    );
  if (host.startsWith('https:') && (reason === 'ECONNRESET' || reason === 'EPIPE' || REFUSED_BY_TLS.test(reason)))
    return new DaemonUnreachable(
      `the daemon at ${host} closed the connection: it probably does not accept the certificate in ${tls ?? ''}`,
      cause,
      'the certificate is revoked, has expired, or belongs to another cluster (vmctl certs show), or a clock is ' +
        'wrong (date); the log of the daemon has the reason under "refused a connection"',
    );
  return new DaemonUnreachable(`no daemon answers at ${host}`, cause);
}

const CERTIFICATE_ERROR = /^(CERT_|UNABLE_TO_|DEPTH_ZERO_|SELF_SIGNED_|CRL_)/;
const REFUSED_BY_TLS = /^(ERR_SSL_|ERR_TLS_)/;

export class ApiClient {
  constructor(private readonly options: ClientOptions) {
    if (!/^unix:.|^https:\/\/./.test(options.host))
      throw new MigrationError('USAGE', `"${options.host}" is neither unix:PATH nor https://ADDRESS:PORT`);
    if (options.host.startsWith('https:') && options.tls === null)
      throw new MigrationError('USAGE', 'https needs the folder of a client certificate, or of the CA for a token', {
        remedy: 'give it with --tls DIR or VMIGRATE_TLS; create one with vmctl certs user NAME',
      });
  }

  get<T>(path: string): Promise<T> {
    return this.json({ method: 'GET', path });
  }

  post<T>(path: string, body?: unknown): Promise<T> {
    if (body === undefined) return this.json({ method: 'POST', path });
    return this.json({
      method: 'POST',
      path,
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
    });
  }

  delete<T>(path: string, body?: unknown): Promise<T> {
    if (body === undefined) return this.json({ method: 'DELETE', path });
    const headers = { 'content-type': 'application/json' };
    return this.json({ method: 'DELETE', path, headers, body: JSON.stringify(body) });
  }

  /** Posts the YAML (or JSON) text of a user's file. */
  postText<T>(path: string, body: string): Promise<T> {
    return this.json({ method: 'POST', path, headers: { 'content-type': 'application/yaml' }, body });
  }

  /** Follows the views of a job until `onView` returns true or the daemon ends the stream. */
  async followJob(id: string, onView: (view: JobView) => boolean, signal?: AbortSignal): Promise<void> {
    await this.followEvents(`/v1/jobs/${id}/events`, (_, data) => onView(data as JobView), signal);
  }

  /**
   * Follows what happens to the VMs: all that is kept, or what comes after the event `after`. `onOpen` is called when
   * the daemon has answered, also if nothing happens.
   */
  async followVms(
    after: string | undefined,
    onEvent: (event: VmEvent) => void,
    { onOpen, signal }: { readonly onOpen?: () => void; readonly signal?: AbortSignal } = {},
  ): Promise<void> {
    const query = after === undefined ? '' : `?after=${encodeURIComponent(after)}`;
    const onData = (type: string, data: unknown): boolean => {
      if (type === 'vm') onEvent(data as VmEvent);
      return false;
    };
    await this.followEvents(`/v1/events${query}`, onData, signal, onOpen);
  }

  /** Resolves when `onData` returns true, or the daemon ends the stream, or `signal` aborts. */
  private async followEvents(
    path: string,
    onData: (type: string, data: unknown) => boolean,
    signal: AbortSignal | undefined,
    onOpen?: () => void,
  ): Promise<void> {
    const request = await this.request({ method: 'GET', path });
    const { answerMsMax = ANSWER_MS_MAX, silenceMsMax = SILENCE_MS_MAX } = this.options;
    const deadline = setTimeout(() => request.destroy(silentFor(answerMsMax)), answerMsMax);
    const response = await this.send(request).finally(() => clearTimeout(deadline));
    response.setTimeout(silenceMsMax, () => response.destroy(silentFor(silenceMsMax)));
    if (response.statusCode !== 200)
      throw await errorOf(response).catch((cause: NodeJS.ErrnoException) => this.unreachable(cause));
    onOpen?.();
    const stop = (): void => void request.destroy();
    signal?.addEventListener('abort', stop, { once: true });
    try {
      for await (const { type, data } of events(response)) if (onData(type, JSON.parse(data))) break;
    } catch (cause) {
      if (cause instanceof Silence) throw unreachable(this.options, cause);
      if (signal?.aborted !== true) throw new DaemonUnreachable('the connection to the daemon is lost', cause);
    } finally {
      signal?.removeEventListener('abort', stop);
      request.destroy();
    }
  }

  /** Opens the serial line of a VM in both directions, beginning with the last `backlogBytes` of its output. */
  console(vm: string, backlogBytes: number): Promise<Duplex> {
    return this.upgrade(vm, `backlog=${backlogBytes}`);
  }

  /** Opens a stream of all output of the VM's serial line so far. It fails if the daemon falls silent in between. */
  async serialLog(vm: string): Promise<Duplex> {
    const { silenceMsMax = SILENCE_MS_MAX } = this.options;
    const socket = await this.upgrade(vm, 'follow=false');
    socket.setTimeout(silenceMsMax, () => socket.destroy(unreachable(this.options, silentFor(silenceMsMax))));
    return socket;
  }

  /**
   * Opens all serial output that `host` keeps of a VM, through this daemon. The stream fails with DISCONNECTED if it is
   * cut off, or if nothing arrives for long.
   */
  async serialLogOn(host: string, vm: string): Promise<Readable> {
    const { answerMsMax = ANSWER_MS_MAX, silenceMsMax = SILENCE_MS_MAX } = this.options;
    const query = `host=${encodeURIComponent(host)}`;
    const request = await this.request({ method: 'GET', path: `/v1/vms/${encodeURIComponent(vm)}/serial?${query}` });
    const deadline = setTimeout(() => request.destroy(silentFor(answerMsMax)), answerMsMax);
    const response = await this.send(request).finally(() => clearTimeout(deadline));
    if (response.statusCode !== 200)
      throw await errorOf(response).catch((cause: NodeJS.ErrnoException) => this.unreachable(cause));
    const log = new PassThrough();
    const cutOff = (cause?: Error): void =>
      void log.destroy(new MigrationError('DISCONNECTED', `the log of ${vm} on ${host} was cut off`, { cause }));
    response.setTimeout(silenceMsMax, () => response.destroy(silentFor(silenceMsMax)));
    response.once('error', cutOff);
    response.once('close', () => {
      if (!response.complete) cutOff();
    });
    log.once('close', () => response.destroy());
    return response.pipe(log);
  }

  private async upgrade(vm: string, query: string): Promise<Socket> {
    const request = await this.request({
      method: 'GET',
      path: `/v1/vms/${encodeURIComponent(vm)}/console?${query}`,
      headers: { connection: 'Upgrade', upgrade: CONSOLE_PROTOCOL },
    });
    const { answerMsMax = ANSWER_MS_MAX } = this.options;
    const deadline = setTimeout(() => request.destroy(silentFor(answerMsMax)), answerMsMax);
    const opening = new Promise<Socket>((resolve, reject) => {
      request.once('upgrade', (_, socket, head) => {
        if (head.length > 0) socket.unshift(head);
        socket.setTimeout(0);
        resolve(socket);
      });
      request.once('response', (response) => void errorOf(response).then(reject, reject));
      request.once('error', (error) => reject(this.unreachable(error)));
      request.end();
    });
    return opening.finally(() => clearTimeout(deadline));
  }

  private async json<T>(options: SendOptions): Promise<T> {
    const { answerMsMax = ANSWER_MS_MAX } = this.options;
    const request = await this.request(options);
    let stuck: ClientRequest | IncomingMessage = request;
    const giveUp = (): void => void stuck.destroy(silentFor(answerMsMax));
    const deadline = options.method === 'GET' ? setTimeout(giveUp, answerMsMax) : undefined;
    try {
      const response = await this.send(request, options.body);
      stuck = response;
      if (response.statusCode === undefined || response.statusCode >= 300) throw await errorOf(response);
      return parse(await readText(response)) as T;
    } catch (cause) {
      throw this.unreachable(cause as NodeJS.ErrnoException);
    } finally {
      clearTimeout(deadline);
    }
  }

  private send(request: ClientRequest, body?: string): Promise<IncomingMessage> {
    return new Promise((resolve, reject) => {
      request.once('response', resolve);
      request.once('error', (error) => reject(this.unreachable(error)));
      request.end(body);
    });
  }

  private async request({ method, path, headers, body }: SendOptions): Promise<ClientRequest> {
    const length = body === undefined ? {} : { 'content-length': Buffer.byteLength(body) };
    const { host, tls, token = null } = this.options;
    const bearer = token === null ? {} : { authorization: `Bearer ${token}` };
    const common: RequestOptions = { method, path, headers: { ...headers, ...length, ...bearer }, agent: false };
    const request = host.startsWith('unix:')
      ? httpRequest({ ...common, socketPath: host.slice('unix:'.length) })
      : await tlsRequest(host, { directory: tls ?? '', token }, common);
    request.once('socket', (socket) => {
      socket.setTimeout(CONNECT_MS, () => {
        if (socket.connecting) request.destroy(new Error(`no answer within ${CONNECT_MS} ms`));
      });
      socket.once('connect', () => {
        socket.setTimeout(0);
        // The host of the daemon may vanish while a long request runs.
        socket.setKeepAlive(true, KEEP_ALIVE_MS);
      });
    });
    return request;
  }

  private unreachable(cause: NodeJS.ErrnoException): MigrationError {
    if (cause instanceof MigrationError) return cause;
    return unreachable(this.options, cause);
  }
}

async function tlsRequest(
  host: string,
  { directory, token }: { directory: string; token: string | null },
  common: RequestOptions,
): Promise<ClientRequest> {
  const [{ readFile }, { X509Certificate }, { request }, { checkHostIdentity }] = await Promise.all([
    import('node:fs/promises'),
    import('node:crypto'),
    import('node:https'),
    import('../tls/identity.js'),
  ]);
  const read = (name: string): Promise<Buffer> =>
    readFile(`${directory}/${name}`).catch((cause: unknown) => {
      throw new MigrationError('USAGE', `cannot read ${directory}/${name}`, { cause });
    });
  const [ca, crl] = await Promise.all(['ca.pem', 'crl.pem'].map(read));
  // With both, the daemon would go by the certificate.
  const [cert, key] = token === null ? await Promise.all(['cert.pem', 'key.pem'].map(read)) : [];
  if (cert !== undefined) refuseOutdated(new X509Certificate(cert), directory);
  return request(new URL(common.path ?? '/', host), {
    ...common,
    ...(token === null ? { cert, key } : {}),
    ...{ ca, crl },
    minVersion: 'TLSv1.3',
    checkServerIdentity: checkHostIdentity(null),
  });
}

/** The daemon would close the connection without a word. */
function refuseOutdated({ validFrom, validTo }: X509CertificateType, directory: string): void {
  const nowMs = Date.now();
  const isEarly = Date.parse(validFrom) > nowMs;
  if (!isEarly && Date.parse(validTo) > nowMs) return;
  const when = isEarly ? `is valid only from ${validFrom} on` : `expired on ${validTo}`;
  throw new MigrationError('UNAUTHENTICATED', `the certificate in ${directory} ${when}`, {
    remedy:
      'check the clock of this machine (date); else create a new one: vmctl certs user NAME --dir CA_DIR --out DIR',
  });
}

async function readText(response: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of response as AsyncIterable<Buffer>) {
    bytes += chunk.length;
    if (bytes > ANSWER_BYTES_MAX)
      throw new MigrationError('PEER_PROTOCOL', `the daemon's answer exceeds ${ANSWER_BYTES_MAX / 2 ** 20} MiB`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString('utf8');
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new MigrationError('PEER_PROTOCOL', "the daemon's answer is not JSON", { cause });
  }
}

async function errorOf(response: IncomingMessage): Promise<MigrationError> {
  return MigrationError.fromJSON(parse(await readText(response)), 'the daemon');
}

/** Yields the type and the data of each server-sent event. */
async function* events(response: IncomingMessage): AsyncGenerator<{ type: string; data: string }> {
  response.setEncoding('utf8');
  let rest = '';
  for await (const chunk of response as AsyncIterable<string>) {
    rest += chunk;
    for (let end = rest.indexOf('\n\n'); end >= 0; end = rest.indexOf('\n\n')) {
      const lines = rest.slice(0, end).split('\n');
      const field = (name: string): string =>
        lines
          .filter((line) => line.startsWith(`${name}:`))
          .map((line) => line.slice(name.length + 1).trimStart())
          .join('\n');
      rest = rest.slice(end + 2);
      const data = field('data');
      if (data !== '') yield { type: field('event'), data };
    }
    if (rest.length > EVENT_BYTES_MAX)
      throw new MigrationError('PEER_PROTOCOL', `an event of the daemon exceeds ${EVENT_BYTES_MAX / 2 ** 20} MiB`);
  }
}

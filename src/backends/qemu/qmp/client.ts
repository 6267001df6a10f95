/**
 * A QMP client over QEMU's unix socket: commands with ids, out-of-band commands, events, deadlines, abort.
 *
 * QEMU is not trusted. A line has a maximum length, and anything that is not QMP ends the connection with
 * PEER_PROTOCOL. An answer that comes after its command has been abandoned (deadline, abort) is dropped. An answer to a
 * command that was never sent is a protocol error.
 *
 * Errors: QEMU_FAILED (QEMU refused; details {class, desc}), QEMU_GONE (connection lost), TIMEOUT, CANCELLED,
 * PEER_PROTOCOL.
 */
import { EventEmitter } from 'node:events';
import type { Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../../../domain/errors.js';
import { deferred } from '../../../kit/deferred.js';
import { connectUnix } from '../../../kit/unix-socket.js';
import { LineSplitter } from './line-splitter.js';
import type { QmpCommands } from './schema.js';

/** query-qmp-schema, the longest answer, has about 200 KB. */
export const QMP_LINE_BYTES_MAX = 8 * 1024 * 1024;
const COMMAND_TIMEOUT_MS = 10_000;
const CONNECT_RETRY_MS = 5;

export interface QmpEvent {
  readonly name: string;
  readonly data: Readonly<Record<string, unknown>>;
  /** QEMU's wall clock. */
  readonly timestampUs: number;
}

export interface QmpConnectOptions {
  /** For connection, greeting and capabilities together. */
  readonly timeoutMs: number;
  readonly signal?: AbortSignal;
  /** For a QEMU that is just starting: retry while the socket does not exist or no process listens. */
  readonly isRetrying?: boolean;
}

export interface QmpExecuteOptions {
  /** Default 10 s. */
  readonly timeoutMs?: number;
  readonly signal?: AbortSignal;
  /** The command overtakes commands that QEMU is still busy with. Only some commands allow it. */
  readonly isOutOfBand?: boolean;
}

export interface QmpWaitOptions {
  readonly timeoutMs: number;
  readonly signal?: AbortSignal;
  readonly filter?: (event: QmpEvent) => boolean;
}

type Arguments<C extends keyof QmpCommands> = QmpCommands[C]['arguments'];
type OptionalArguments<C extends keyof QmpCommands> =
  Partial<Arguments<C>> extends Arguments<C>
    ? [args?: Arguments<C>, options?: QmpExecuteOptions]
    : Arguments<C> extends Record<string, never>
      ? [args?: Record<string, never>, options?: QmpExecuteOptions]
      : [args: Arguments<C>, options?: QmpExecuteOptions];

interface Pending {
  readonly command: string;
  resolve(value: unknown): void;
  reject(error: Error): void;
}

export class QmpClient {
  readonly #socket: Socket;
  readonly #path: string;
  readonly #lines = new LineSplitter(QMP_LINE_BYTES_MAX);
  readonly #pending = new Map<number, Pending>();
  readonly #emitter = new EventEmitter();
  #nextId = 1;
  #closedBy: MigrationError | null = null;
  #isGreeted = false;
  #hasOutOfBand = false;
  #version = '';

  private constructor(path: string, socket: Socket) {
    this.#path = path;
    this.#socket = socket;
    this.#emitter.setMaxListeners(0);
    socket.on('data', (chunk) => this.#receive(chunk));
    socket.on('error', (error) => this.#end(this.#gone(error)));
    socket.on('close', () => this.#end(this.#gone()));
  }

  static async connect(path: string, options: QmpConnectOptions): Promise<QmpClient> {
    const deadline = AbortSignal.timeout(options.timeoutMs);
    const signal = options.signal === undefined ? deadline : AbortSignal.any([deadline, options.signal]);
    const interrupted = () =>
      options.signal?.aborted === true
        ? new MigrationError('CANCELLED', `connecting to ${path} was cancelled`)
        : new MigrationError('TIMEOUT', `no QMP greeting on ${path} within ${options.timeoutMs} ms`);
    const socket = await openSocket(path, signal, options.isRetrying === true, interrupted);
    const client = new QmpClient(path, socket);
    try {
      await client.#greet(signal, interrupted);
      return client;
    } catch (error) {
      client.close();
      throw error;
    }
  }

  get isClosed(): boolean {
    return this.#closedBy !== null;
  }

  /** QEMU's version from its greeting, such as "7.2.22". */
  get version(): string {
    return this.#version;
  }

  async execute<C extends keyof QmpCommands>(
    command: C,
    ...[args, options]: OptionalArguments<C>
  ): Promise<QmpCommands[C]['returns']> {
    return this.executeUntyped(command, args, options);
  }

  /** Executes a command that is not in the typed list. */
  async executeUntyped(command: string, args?: object, options: QmpExecuteOptions = {}): Promise<unknown> {
    if (this.#closedBy !== null) throw this.#closedBy;
    if (options.signal?.aborted === true) throw cancelled(command);
    const isOutOfBand = options.isOutOfBand === true && this.#hasOutOfBand;
    const id = this.#nextId++;
    const timeoutMs = options.timeoutMs ?? COMMAND_TIMEOUT_MS;
    const { promise, resolve, reject } = deferred<unknown>();
    this.#pending.set(id, { command, resolve, reject });
    const timer = setTimeout(
      () => reject(new MigrationError('TIMEOUT', `QEMU did not answer ${command} within ${timeoutMs} ms`)),
      timeoutMs,
    );
    const onAbort = () => reject(cancelled(command));
    options.signal?.addEventListener('abort', onAbort, { once: true });
    const isBare = args === undefined || Object.keys(args).length === 0;
    // The request is kept short, because QEMU reads its monitor byte by byte, at some 4 µs each.
    const request = {
      [isOutOfBand ? 'exec-oob' : 'execute']: command,
      ...(isBare ? {} : { arguments: args }),
      id,
    };
    this.#socket.write(`${JSON.stringify(request)}\n`);
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
      options.signal?.removeEventListener('abort', onAbort);
      this.#pending.delete(id);
    }
  }

  on(_name: 'event', listener: (event: QmpEvent) => void): void {
    this.#emitter.on('event', listener);
  }

  off(_name: 'event', listener: (event: QmpEvent) => void): void {
    this.#emitter.off('event', listener);
  }

  /** The listener is called once, also if the connection has already ended. Returns a function that removes it. */
  onClosed(listener: (error: MigrationError) => void): () => void {
    if (this.#closedBy === null) this.#emitter.once('closed', listener);
    else queueMicrotask(() => listener(this.#closedBy ?? this.#gone()));
    return () => this.#emitter.off('closed', listener);
  }

  /** Waits for the next such event. It must be called before the command that causes the event. */
  async waitForEvent(name: string, options: QmpWaitOptions): Promise<QmpEvent> {
    if (this.#closedBy !== null) throw this.#closedBy;
    const { promise, resolve, reject } = deferred<QmpEvent>();
    const onEvent = (event: QmpEvent) => {
      if (event.name === name && (options.filter === undefined || options.filter(event))) resolve(event);
    };
    const onAbort = () => reject(cancelled(`waiting for ${name}`));
    const timer = setTimeout(
      () => reject(new MigrationError('TIMEOUT', `no ${name} from QEMU within ${options.timeoutMs} ms`)),
      options.timeoutMs,
    );
    this.#emitter.on('event', onEvent);
    this.#emitter.once('closed', reject);
    options.signal?.addEventListener('abort', onAbort, { once: true });
    if (options.signal?.aborted === true) onAbort();
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
      this.#emitter.off('event', onEvent);
      this.#emitter.off('closed', reject);
      options.signal?.removeEventListener('abort', onAbort);
    }
  }

  /** Closes the connection. QEMU keeps running. Commands without an answer are rejected. Idempotent. */
  close(): void {
    this.#end(new MigrationError('QEMU_GONE', `the QMP connection ${this.#path} was closed`));
  }

  async #greet(signal: AbortSignal, interrupted: () => MigrationError): Promise<void> {
    const { promise, resolve, reject } = deferred<readonly string[]>();
    const onAbort = () => reject(interrupted());
    signal.addEventListener('abort', onAbort, { once: true });
    this.#emitter.once('greeting', resolve);
    this.#emitter.once('closed', reject);
    if (this.#closedBy !== null) reject(this.#closedBy);
    try {
      const capabilities = await promise;
      this.#hasOutOfBand = capabilities.includes('oob');
      const args = this.#hasOutOfBand ? { enable: ['oob'] as const } : {};
      await this.execute('qmp_capabilities', args, { signal }).catch((error: unknown) => {
        throw error instanceof MigrationError && error.code === 'CANCELLED' ? interrupted() : error;
      });
    } finally {
      signal.removeEventListener('abort', onAbort);
      this.#emitter.off('greeting', resolve);
      this.#emitter.off('closed', reject);
    }
  }

  #receive(chunk: Buffer): void {
    const lines = this.#lines.push(chunk);
    if (lines === null) {
      this.#end(this.#protocolError(`a line is longer than ${QMP_LINE_BYTES_MAX} bytes`));
      return;
    }
    for (const line of lines) {
      if (this.#closedBy !== null) return;
      if (line.length > 0) this.#message(line);
    }
  }

  #message(line: string): void {
    let message: unknown;
    try {
      message = JSON.parse(line);
    } catch (error) {
      this.#end(this.#protocolError('a line is not JSON', error));
      return;
    }
    if (!isRecord(message)) this.#end(this.#protocolError('a message is not an object'));
    else if (!this.#isGreeted) this.#greeting(message);
    else if (typeof message['event'] === 'string') this.#event(message['event'], message);
    else this.#answer(message);
  }

  #greeting(message: Record<string, unknown>): void {
    const greeting = message['QMP'];
    const version = isRecord(greeting) && isRecord(greeting['version']) ? greeting['version']['qemu'] : undefined;
    if (!isRecord(greeting) || !isRecord(version) || !Array.isArray(greeting['capabilities'])) {
      this.#end(this.#protocolError('the greeting is not QMP'));
      return;
    }
    this.#isGreeted = true;
    this.#version = [version['major'], version['minor'], version['micro']].map(Number).join('.');
    this.#emitter.emit('greeting', greeting['capabilities']);
  }

  #event(name: string, message: Record<string, unknown>): void {
    const stamp = isRecord(message['timestamp']) ? message['timestamp'] : {};
    const event: QmpEvent = {
      name,
      data: isRecord(message['data']) ? message['data'] : {},
      timestampUs: Number(stamp['seconds'] ?? 0) * 1e6 + Number(stamp['microseconds'] ?? 0),
    };
    this.#emitter.emit('event', event);
  }

  #answer(message: Record<string, unknown>): void {
    const id = message['id'];
    if (typeof id !== 'number' || !Number.isInteger(id) || id < 1 || id >= this.#nextId) {
      this.#end(this.#protocolError('an answer has an unknown id'));
      return;
    }
    const pending = this.#pending.get(id);
    if (pending === undefined) return;
    const error = message['error'];
    if (isRecord(error)) pending.reject(refused(pending.command, error));
    else if ('return' in message) pending.resolve(message['return']);
    else this.#end(this.#protocolError('an answer has neither return nor error'));
  }

  #end(error: MigrationError): void {
    if (this.#closedBy !== null) return;
    this.#closedBy = error;
    this.#socket.destroy();
    for (const pending of this.#pending.values()) pending.reject(error);
    this.#emitter.emit('closed', error);
  }

  #gone(cause?: Error): MigrationError {
    return new MigrationError('QEMU_GONE', `QEMU has closed ${this.#path}`, cause === undefined ? {} : { cause });
  }

  #protocolError(what: string, cause?: unknown): MigrationError {
    return new MigrationError('PEER_PROTOCOL', `${this.#path} does not speak QMP: ${what}`, { cause });
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function cancelled(what: string): MigrationError {
  return new MigrationError('CANCELLED', `${what} was cancelled`);
}

function refused(command: string, error: Record<string, unknown>): MigrationError {
  const desc = typeof error['desc'] === 'string' ? error['desc'] : 'no reason given';
  const errorClass = typeof error['class'] === 'string' ? error['class'] : '';
  return new MigrationError('QEMU_FAILED', `QEMU refused ${command}: ${desc}`, {
    details: { class: errorClass, desc },
  });
}

async function openSocket(
  path: string,
  signal: AbortSignal,
  isRetrying: boolean,
  interrupted: () => MigrationError,
): Promise<Socket> {
  for (;;) {
    if (signal.aborted) throw interrupted();
    try {
      return await connectOnce(path, signal);
    } catch (error) {
      if (signal.aborted) throw interrupted();
      const code = (error as NodeJS.ErrnoException).code;
      if (!isRetrying || (code !== 'ENOENT' && code !== 'ECONNREFUSED')) {
        throw new MigrationError('QEMU_GONE', `QEMU does not answer on ${path}`, { cause: error });
      }
    }
    await sleep(CONNECT_RETRY_MS);
  }
}

function connectOnce(path: string, signal: AbortSignal): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connectUnix(path);
    const onAbort = () => socket.destroy(new Error('aborted'));
    signal.addEventListener('abort', onAbort, { once: true });
    socket.once('connect', () => {
      signal.removeEventListener('abort', onAbort);
      socket.off('error', reject);
      resolve(socket);
    });
    socket.once('error', (error) => {
      signal.removeEventListener('abort', onAbort);
      reject(error);
    });
  });
}

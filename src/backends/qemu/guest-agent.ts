/**
 * A client of the guest agent (qemu-ga) over the socket of its port. It sends one command at a time, each with a
 * deadline. After a missed deadline the connection cannot be used any more. The guest is not trusted, so a line has a
 * maximum length. Lines that are not an answer are skipped: the agent of a clone may have been forked in the middle of
 * one. QEMU does not report whether an agent runs in the guest, so every connection starts with `sync`.
 *
 * Errors: TIMEOUT (no agent answers), QEMU_GONE (the port is closed), QEMU_FAILED (the agent refused), PEER_PROTOCOL.
 */
import type { Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../../domain/errors.js';
import { deferred } from '../../kit/deferred.js';
import { connectUnix } from '../../kit/unix-socket.js';
import type { GuestAgentLink } from '../backend.js';
import { LineSplitter } from './qmp/line-splitter.js';

const LINE_BYTES_MAX = 1024 * 1024;
const COMMAND_TIMEOUT_MS = 10_000;
const SYNC_RETRY_MS = 500;
const STATUS_POLL_MS = 100;
const SYNC_ID_MAX = 2 ** 31;
const NS_PER_MS = 1e6;

export class GuestAgent implements GuestAgentLink {
  readonly #socket: Socket;
  readonly #lines = new LineSplitter(LINE_BYTES_MAX);
  #answer: ((message: Record<string, unknown>) => void) | null = null;
  #closedBy: MigrationError | null = null;
  readonly #closed = deferred<never>();

  private constructor(socket: Socket) {
    this.#socket = socket;
    this.#closed.promise.catch(() => undefined);
    socket.on('data', (chunk) => this.#receive(chunk));
    socket.on('error', (cause) =>
      this.#end(new MigrationError('QEMU_GONE', 'the port of the guest agent is lost', { cause })),
    );
    socket.on('close', () => this.#end(new MigrationError('QEMU_GONE', 'the port of the guest agent is closed')));
  }

  /** Resolves when an agent answers. The answers to earlier commands of other clients have been skipped then. */
  static async connect(path: string, timeoutMs: number): Promise<GuestAgent> {
    const agent = new GuestAgent(await open(path));
    const deadlineMs = performance.now() + timeoutMs;
    try {
      while (!(await agent.#isInSync(Math.min(SYNC_RETRY_MS, timeoutMs)))) {
        if (performance.now() >= deadlineMs) {
          throw new MigrationError('TIMEOUT', `no guest agent has answered within ${timeoutMs} ms`);
        }
      }
      return agent;
    } catch (error) {
      agent.close();
      throw error;
    }
  }

  async execute(command: string, args: object = {}, timeoutMs = COMMAND_TIMEOUT_MS): Promise<unknown> {
    const answer = await this.#ask({ execute: command, arguments: args }, timeoutMs, () => true);
    if (answer === null) {
      this.close();
      throw new MigrationError('TIMEOUT', `the guest agent did not answer ${command} within ${timeoutMs} ms`);
    }
    const { error } = answer;
    if (error === undefined) return answer['return'];
    const reason = isRecord(error) && typeof error['desc'] === 'string' ? error['desc'] : 'no reason given';
    throw new MigrationError('QEMU_FAILED', `the guest agent refused ${command}: ${reason}`);
  }

  async setTime(timeMs: number): Promise<void> {
    await this.execute('guest-set-time', { time: timeMs * NS_PER_MS });
  }

  async timeMs(): Promise<number> {
    return Number(await this.execute('guest-get-time')) / NS_PER_MS;
  }

  /** Runs a program in the guest until it ends. Throws QEMU_FAILED if its exit code is not 0. */
  async run(path: string, args: readonly string[], timeoutMs: number): Promise<void> {
    const deadlineMs = performance.now() + timeoutMs;
    const started = await this.execute('guest-exec', { path, arg: args });
    const pid = isRecord(started) ? started['pid'] : undefined;
    for (;;) {
      const status = await this.execute('guest-exec-status', { pid });
      if (isRecord(status) && status['exited'] === true) {
        if (status['exitcode'] === 0) return;
        throw new MigrationError('QEMU_FAILED', `${path} in the guest ended with ${String(status['exitcode'])}`);
      }
      if (performance.now() >= deadlineMs) {
        throw new MigrationError('TIMEOUT', `${path} in the guest has not ended within ${timeoutMs} ms`);
      }
      await sleep(STATUS_POLL_MS);
    }
  }

  /** Idempotent. */
  close(): void {
    this.#socket.destroy();
  }

  async #isInSync(timeoutMs: number): Promise<boolean> {
    const id = Math.floor(Math.random() * SYNC_ID_MAX);
    const isOurs = (message: Record<string, unknown>) => message['return'] === id;
    return (await this.#ask({ execute: 'guest-sync', arguments: { id } }, timeoutMs, isOurs)) !== null;
  }

  /** Returns the first wanted answer, or null if none came in time. */
  async #ask(
    request: object,
    timeoutMs: number,
    isWanted: (message: Record<string, unknown>) => boolean,
  ): Promise<Record<string, unknown> | null> {
    if (this.#closedBy !== null) throw this.#closedBy;
    const { promise, resolve } = deferred<Record<string, unknown> | null>();
    const timer = setTimeout(() => resolve(null), timeoutMs);
    this.#answer = (message) => {
      if (isWanted(message)) resolve(message);
    };
    this.#socket.write(`${JSON.stringify(request)}\n`);
    try {
      return await Promise.race([promise, this.#closed.promise]);
    } finally {
      clearTimeout(timer);
      this.#answer = null;
    }
  }

  #receive(chunk: Buffer): void {
    const lines = this.#lines.push(chunk);
    if (lines === null) this.#end(protocolError(`a line is longer than ${LINE_BYTES_MAX} bytes`));
    for (const line of lines ?? []) {
      const message = parsed(line);
      if (isRecord(message)) this.#answer?.(message);
    }
  }

  #end(error: MigrationError): void {
    this.#closedBy ??= error;
    this.#closed.reject(this.#closedBy);
    this.#socket.destroy();
  }
}

function parsed(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    return null;
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function protocolError(what: string): MigrationError {
  return new MigrationError('PEER_PROTOCOL', `the port is not answered by a guest agent: ${what}`);
}

function open(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connectUnix(path);
    const onError = (cause: Error) =>
      reject(new MigrationError('QEMU_GONE', `the port of the guest agent, ${path}, does not answer`, { cause }));
    socket.once('error', onError);
    socket.once('connect', () => {
      socket.off('error', onError);
      resolve(socket);
    });
  });
}

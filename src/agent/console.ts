/**
 * A VM's serial console for any number of readers. Output comes from the log file that QEMU appends to, so that every reader gets every byte once,
 * at its own pace, and a slow one never makes the guest wait. Input goes into the serial socket.
 */
import { type FSWatcher, watch } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { connect, type Socket } from 'node:net';
import { Duplex } from 'node:stream';
import { MigrationError } from '../errors.js';

export const CONSOLE_BACKLOG_BYTES_MAX = 64 * 1024;
const READ_BYTES = 64 * 1024;

export interface ConsoleOptions {
  /** Serial socket of a running VM; null for one that has stopped: its log can still be read. */
  readonly socketPath: string | null;
  readonly logPath: string;
  /** How much of the past to begin with; at most CONSOLE_BACKLOG_BYTES_MAX. */
  readonly backlogBytes: number;
  /** End after the backlog instead of waiting for more. */
  readonly isFollowing: boolean;
}

/** Ends when QEMU does. NOT_FOUND if there is no log (yet); QEMU_GONE if the socket does not answer. */
export async function openConsole(options: ConsoleOptions): Promise<Duplex> {
  const socket = options.socketPath === null || !options.isFollowing ? null : await openInput(options.socketPath);
  let log: FileHandle;
  try {
    log = await open(options.logPath, 'r');
  } catch (error) {
    socket?.destroy();
    throw new MigrationError('NOT_FOUND', `${options.logPath} cannot be read`, { cause: error });
  }
  const { size } = await log.stat();
  const backlogBytes = Math.max(0, Math.min(options.backlogBytes, CONSOLE_BACKLOG_BYTES_MAX));
  return new ConsoleStream(log, options.logPath, Math.max(0, size - backlogBytes), socket);
}

class ConsoleStream extends Duplex {
  readonly #log: FileHandle;
  readonly #socket: Socket | null;
  readonly #watcher: FSWatcher | null = null;
  #offset: number;
  #isWanted = false;
  #isReading = false;
  /** The log has changed since the read under way began. */
  #isChanged = false;
  #isOver: boolean;

  constructor(log: FileHandle, path: string, offset: number, socket: Socket | null) {
    super({ allowHalfOpen: false });
    this.#log = log;
    this.#offset = offset;
    this.#socket = socket;
    this.#isOver = socket === null;
    if (socket === null) return;
    this.#watcher = watch(path, () => this.#onChange());
    this.#watcher.on('error', (error) => this.destroy(error));
    // The same bytes come from the log: this only keeps QEMU from waiting for us.
    socket.resume();
    socket.on('error', () => socket.destroy());
    socket.on('close', () => {
      this.#isOver = true;
      this.#onChange();
    });
  }

  override _read(): void {
    this.#isWanted = true;
    void this.#pump();
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    if (this.#socket === null || this.#isOver) done(new MigrationError('QEMU_GONE', 'nobody listens on this console'));
    else this.#socket.write(chunk, done);
  }

  override _final(done: (error?: Error | null) => void): void {
    done();
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#watcher?.close();
    this.#socket?.destroy();
    this.#log.close().then(
      () => done(error),
      () => done(error),
    );
  }

  #onChange(): void {
    this.#isChanged = true;
    if (this.#isWanted) void this.#pump();
  }

  async #pump(): Promise<void> {
    if (this.#isReading || this.destroyed) return;
    this.#isReading = true;
    try {
      while (this.#isWanted && !this.destroyed) {
        this.#isChanged = false;
        const wasOver = this.#isOver;
        const { buffer, bytesRead } = await this.#log.read(Buffer.alloc(READ_BYTES), 0, READ_BYTES, this.#offset);
        if (bytesRead > 0) {
          this.#offset += bytesRead;
          this.#isWanted = this.push(buffer.subarray(0, bytesRead));
        } else if (wasOver) {
          this.push(null);
          return;
        } else if (!this.#isChanged) {
          return;
        }
      }
    } catch (error) {
      this.destroy(error instanceof Error ? error : new Error(String(error)));
    } finally {
      this.#isReading = false;
    }
  }
}

function openInput(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect({ path });
    const onError = (cause: Error) =>
      reject(new MigrationError('QEMU_GONE', `the console ${path} does not answer`, { cause }));
    socket.once('error', onError);
    socket.once('connect', () => {
      socket.off('error', onError);
      resolve(socket);
    });
  });
}

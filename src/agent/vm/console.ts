/**
 * A VM's serial console for any number of readers. Output comes from the VM's log, which is bounded. So every reader
 * gets every byte once, at its own pace, unless it is slower than the log is overwritten. No reader makes the guest
 * wait. Input goes to the serial socket. QEMU serves one connection to it at a time, so all readers of a VM share one.
 */
import { type FSWatcher, watch } from 'node:fs';
import type { Socket } from 'node:net';
import { basename, dirname } from 'node:path';
import { Duplex } from 'node:stream';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { isOutOfDescriptors } from '../../kit/spare-descriptor.js';
import { connectUnix } from '../../kit/unix-socket.js';
import { LogReader } from './log-reader.js';

export const CONSOLE_BACKLOG_BYTES_MAX = 64 * 1024;
const READ_BYTES = 64 * 1024;

export interface ConsoleOptions {
  /** Serial socket of a running VM. Null for a stopped VM, whose log can still be read. */
  readonly socketPath: string | null;
  readonly logPath: string;
  /** How much of the earlier output to send first. A reader that follows gets at most CONSOLE_BACKLOG_BYTES_MAX. */
  readonly backlogBytes: number;
  /** If false, the stream ends after the backlog instead of waiting for more output. */
  readonly isFollowing: boolean;
  /** Resolves when the log has all output of a VM that has ended. Default: at once. */
  readonly kept?: () => Promise<void>;
}

/**
 * The stream ends when QEMU ends. Throws NOT_FOUND if there is no log (yet), QEMU_GONE if the socket does not answer,
 * OUT_OF_MEMORY if a limit of the host is met.
 */
export async function openConsole(options: ConsoleOptions): Promise<Duplex> {
  const { socketPath, logPath } = options;
  const input = socketPath === null || !options.isFollowing ? null : await SharedInput.take(socketPath);
  const backlogBytesMax = options.isFollowing ? CONSOLE_BACKLOG_BYTES_MAX : Number.MAX_SAFE_INTEGER;
  const backlogBytes = Math.max(0, Math.min(options.backlogBytes, backlogBytesMax));
  let log: LogReader | null = null;
  try {
    log = await LogReader.open(logPath, backlogBytes);
    return new ConsoleStream(log, options, input);
  } catch (error) {
    input?.giveBack();
    await log?.close();
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw toMigrationError(error);
    throw new MigrationError('NOT_FOUND', `${logPath} cannot be read`, { cause: error });
  }
}

class ConsoleStream extends Duplex {
  readonly #log: LogReader;
  readonly #kept: () => Promise<void>;
  readonly #input: SharedInput | null;
  readonly #watcher: FSWatcher | null = null;
  #isWanted = false;
  #isReading = false;
  /** How much is still to be sent. A guest may write faster than anybody reads, so a backlog has an end. */
  #bytesLeft: number;
  /** True if the log has changed since the current read began. */
  #isChanged = false;
  #isOver: boolean;

  constructor(log: LogReader, { logPath, kept, isFollowing }: ConsoleOptions, input: SharedInput | null) {
    super({ allowHalfOpen: false });
    this.#log = log;
    this.#bytesLeft = isFollowing ? Number.POSITIVE_INFINITY : log.backlogBytes;
    this.#kept = kept ?? (() => Promise.resolve());
    this.#input = input;
    this.#isOver = input === null;
    if (input === null) return;
    // A rotation gives the path to another file, so the directory is watched.
    this.#watcher = watch(dirname(logPath), (_, name) => {
      if (name === basename(logPath)) this.#onChange();
    });
    this.#watcher.on('error', (error) => this.destroy(error));
    input.onClosed(this.#onClosed);
  }

  override _read(): void {
    this.#isWanted = true;
    void this.#pump();
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    if (this.#input === null || this.#isOver)
      done(new MigrationError('QEMU_GONE', 'the QEMU of this console has ended'));
    else this.#input.socket.write(chunk, done);
  }

  override _final(done: (error?: Error | null) => void): void {
    done();
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#watcher?.close();
    this.#input?.offClosed(this.#onClosed);
    this.#input?.giveBack();
    this.#closeLog();
    done(error);
  }

  #closeLog(): void {
    this.#log.close().catch(() => undefined);
  }

  readonly #onClosed = (): void => {
    const end = () => {
      this.#isOver = true;
      this.#onChange();
    };
    this.#kept().then(end, end);
  };

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
        const buffer = Buffer.alloc(Math.min(READ_BYTES, this.#bytesLeft));
        const bytesRead = buffer.length === 0 ? 0 : await this.#log.read(buffer);
        this.#bytesLeft -= bytesRead;
        if (bytesRead > 0) {
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

/** One connection to a serial socket, shared by all streams of this process. It is closed with its last user. */
class SharedInput {
  static readonly #open = new Map<string, Promise<SharedInput>>();
  readonly socket: Socket;
  readonly #path: string;
  #userCount = 0;

  private constructor(path: string, socket: Socket) {
    this.#path = path;
    this.socket = socket;
    socket.setMaxListeners(0);
    // The output is discarded, because it comes from the log. Reading it only keeps QEMU from waiting.
    socket.resume();
    socket.on('error', () => socket.destroy());
    socket.on('close', () => SharedInput.#open.delete(path));
  }

  /** Throws QEMU_GONE if no process listens on the socket. */
  static async take(path: string): Promise<SharedInput> {
    let opening = SharedInput.#open.get(path);
    if (opening === undefined) {
      opening = connectTo(path).then((socket) => new SharedInput(path, socket));
      SharedInput.#open.set(path, opening);
      opening.catch(() => SharedInput.#open.delete(path));
    }
    const input = await opening;
    input.#userCount++;
    return input;
  }

  giveBack(): void {
    this.#userCount--;
    if (this.#userCount > 0) return;
    SharedInput.#open.delete(this.#path);
    this.socket.destroy();
  }

  onClosed(listener: () => void): void {
    if (this.socket.destroyed) queueMicrotask(listener);
    else this.socket.on('close', listener);
  }

  offClosed(listener: () => void): void {
    this.socket.off('close', listener);
  }
}

function connectTo(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connectUnix(path);
    const onError = (cause: Error) => {
      const gone = new MigrationError('QEMU_GONE', `the serial socket ${path} does not answer`, { cause });
      reject(isOutOfDescriptors(cause) ? toMigrationError(cause) : gone);
    };
    socket.once('error', onError);
    socket.once('connect', () => {
      socket.off('error', onError);
      resolve(socket);
    });
  });
}

/**
 * Reads a log that another process appends to and rotates: PATH becomes PATH.1 when it is full, PATH.1 becomes PATH.2,
 * and so on. A reader gets every byte once and in order, also across rotations, unless the log has been overwritten
 * faster than it reads; then it goes on with the oldest byte that there is.
 */
import { type FileHandle, open } from 'node:fs/promises';

/** More than any back end keeps. */
const OLDER_FILES_MAX = 16;

interface LogFile {
  readonly handle: FileHandle;
  readonly inode: number;
  readonly sizeBytes: number;
}

export class LogReader {
  readonly #path: string;
  /** The files that are still to be read, the oldest first. The first one is being read. */
  #files: LogFile[];
  #offset: number;
  /** How many bytes there were to read when the reader was opened. */
  readonly backlogBytes: number;

  private constructor(path: string, files: LogFile[], offset: number) {
    this.backlogBytes = files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0) - offset;
    this.#path = path;
    this.#files = files;
    this.#offset = offset;
  }

  /** Begins with the last `backlogBytes` of the log. Throws if there is no log. The caller closes the reader. */
  static async open(path: string, backlogBytes: number): Promise<LogReader> {
    const files = await openAll(path);
    if (files.length === 0) throw Object.assign(new Error(`there is no ${path}`), { code: 'ENOENT' });
    let offset = files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0) - backlogBytes;
    if (offset < 0) offset = 0;
    while (files.length > 1 && offset >= (files[0]?.sizeBytes ?? 0)) {
      const skipped = files.shift();
      offset -= skipped?.sizeBytes ?? 0;
      await skipped?.handle.close();
    }
    return new LogReader(path, files, offset);
  }

  /** Returns how many bytes have been read; 0 if there are no more yet. One call at a time. */
  async read(buffer: Buffer): Promise<number> {
    for (;;) {
      const [file, next] = this.#files;
      if (file === undefined) return 0;
      const { bytesRead } = await file.handle.read(buffer, 0, buffer.length, this.#offset);
      this.#offset += bytesRead;
      if (bytesRead > 0) return bytesRead;
      if (next !== undefined) {
        this.#files.shift();
        this.#offset = 0;
        await file.handle.close();
      } else if (!(await this.#findNewer(file))) {
        return 0;
      }
      // If there are newer files, this one has its last byte by now. So it is read once more before the next one.
    }
  }

  /** Waits for a read in progress. Idempotent. */
  async close(): Promise<void> {
    for (const { handle } of this.#files.splice(0)) await handle.close();
  }

  async #findNewer({ inode }: LogFile): Promise<boolean> {
    // A file that cannot be opened now, for want of descriptors, is tried again with the next output.
    const files = await openAll(this.#path).catch(() => []);
    const place = files.findIndex((file) => file.inode === inode);
    for (const { handle } of files.splice(0, place + 1)) await handle.close();
    // The reader may have been closed meanwhile.
    if (this.#files.length === 0) for (const { handle } of files.splice(0)) await handle.close();
    this.#files.push(...files);
    return files.length > 0;
  }
}

/** Opens the files of a log, the oldest first. Throws the system's error if one is there and cannot be opened. */
async function openAll(path: string): Promise<LogFile[]> {
  const files: LogFile[] = [];
  try {
    for (let number = 0; number <= OLDER_FILES_MAX; number++) {
      const file = await openOne(number === 0 ? path : `${path}.${number}`);
      // In the middle of a rotation one of the names is free for a moment. The newest file may be the one that lacks.
      if (file === null && number > 0) break;
      if (file === null) continue;
      // A rotation between two of these calls shows one file under two names.
      if (files.some(({ inode }) => inode === file.inode)) await file.handle.close();
      else files.unshift(file);
    }
    return files;
  } catch (error) {
    for (const { handle } of files) await handle.close();
    throw error;
  }
}

/** Returns null if there is no such file. */
async function openOne(path: string): Promise<LogFile | null> {
  let handle: FileHandle;
  try {
    handle = await open(path, 'r');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw error;
  }
  try {
    const { ino, size } = await handle.stat();
    return { handle, inode: ino, sizeBytes: size };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

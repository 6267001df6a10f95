/**
 * The exit code of a guest: the last line on its exit port that is a number from 0 to 255. QEMU appends the guest's
 * output to a file in the VM's directory, so the code outlives QEMU and the daemon. The guest may write any amount, so
 * only the end of the file is ever read.
 */
import { type FSWatcher, watch } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';

const READ_BYTES_MAX = 4096;
const CODE_MAX = 255;

/** Returns the path of the exit port's file. `directory` is the VM's. */
export function exitPath(directory: string): string {
  return join(directory, 'exit');
}

export function parseExitCode(text: string): number | null {
  // The text after the last newline is not complete yet.
  const codes = text
    .split('\n')
    .slice(0, -1)
    .filter((line) => /^\s*\d{1,3}\s*$/.test(line))
    .map(Number);
  const last = codes.at(-1);
  return last === undefined || last > CODE_MAX ? null : last;
}

/** Returns null if the guest has not written a code, or if there is no such file. */
export async function readExitCode(path: string): Promise<number | null> {
  const file = await open(path, 'r').catch(() => null);
  if (file === null) return null;
  try {
    const { size } = await file.stat();
    const lengthBytes = Math.min(size, READ_BYTES_MAX);
    const { buffer, bytesRead } = await file.read(Buffer.alloc(lengthBytes), 0, lengthBytes, size - lengthBytes);
    return parseExitCode(buffer.subarray(0, bytesRead).toString('latin1'));
  } finally {
    await file.close();
  }
}

/**
 * Reports each new code: the current one, if there is one, and each later one. The reads never overlap, however fast
 * the guest writes.
 */
export class ExitWatch {
  readonly #path: string;
  readonly #onCode: (code: number) => void;
  readonly #watcher: FSWatcher | null;
  #code: number | null = null;
  #isReading = false;
  #isChanged = false;
  #isClosed = false;

  constructor(path: string, onCode: (code: number) => void) {
    this.#path = path;
    this.#onCode = onCode;
    this.#watcher = follow(path, () => this.#onChange());
    this.#onChange();
  }

  /** Idempotent. */
  close(): void {
    this.#isClosed = true;
    this.#watcher?.close();
  }

  #onChange(): void {
    this.#isChanged = true;
    if (!this.#isReading) void this.#read();
  }

  async #read(): Promise<void> {
    this.#isReading = true;
    while (this.#isChanged && !this.#isClosed) {
      this.#isChanged = false;
      const code = await readExitCode(this.#path).catch(() => null);
      if (code === null || code === this.#code || this.#isClosed) continue;
      this.#code = code;
      this.#onCode(code);
    }
    this.#isReading = false;
  }
}

/** Returns null if there is no file, because the VM was started by a build without exit ports. */
function follow(path: string, onChange: () => void): FSWatcher | null {
  try {
    const watcher = watch(path, { persistent: false }, onChange);
    watcher.on('error', () => watcher.close());
    return watcher;
  } catch {
    return null;
  }
}

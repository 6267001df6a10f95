/**
 * The exit code of a guest: the last line on its exit port that is a number from 0 to 255. The guest may write any
 * amount at any rate. The back end keeps the last bytes until they are taken (`VmProcess.takeExitText`), and this file
 * takes them some times a second at most. VMs of an earlier build write to a file instead, of which only the end is
 * ever read.
 */
import { type FSWatcher, watch } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import type { VmProcess } from '../../backends/backend.js';

const READ_BYTES_MAX = 4096;
const CODE_MAX = 255;
/** The pauses between two reads: the first is short, because a guest writes its code and closes the port. */
const PAUSE_MS_FIRST = 50;
const PAUSE_MS_MAX = 500;

/** Returns the path of the exit port's file in VMs of an earlier build. `directory` is the VM's. */
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

/** Returns the code in the exit file of a VM of an earlier build. Null if there is none, or no such file. */
export async function readExitCode(path: string): Promise<number | null> {
  return parseExitCode(await fileEnd(path));
}

async function fileEnd(path: string): Promise<string> {
  const file = await open(path, 'r').catch(() => null);
  if (file === null) return '';
  try {
    const { size } = await file.stat();
    const lengthBytes = Math.min(size, READ_BYTES_MAX);
    const { buffer, bytesRead } = await file.read(Buffer.alloc(lengthBytes), 0, lengthBytes, size - lengthBytes);
    return lastWhole(buffer.subarray(0, bytesRead).toString('latin1'), size > lengthBytes);
  } finally {
    await file.close();
  }
}

/** Returns the text without the first line if that may have lost its beginning. Its rest could look like a code. */
function lastWhole(text: string, isCut: boolean): string {
  return isCut ? text.slice(text.indexOf('\n') + 1) : text;
}

/** Where the guest's output comes from. `text` is the end of all of it. */
export interface ExitSource {
  read(): Promise<{ readonly text: string; readonly isOpen: boolean }>;
}

/** The output that the back end keeps. Taking it removes it there, so an incomplete last line is kept here. */
export class ProcessExitSource implements ExitSource {
  readonly #process: Pick<VmProcess, 'takeExitText'>;
  #text = '';

  constructor(process: Pick<VmProcess, 'takeExitText'>) {
    this.#process = process;
  }

  async read(): Promise<{ text: string; isOpen: boolean }> {
    const { text, isOpen } = await this.#process.takeExitText();
    // A full text may follow a gap, because the back end has overwritten what came before.
    const isFull = text.length >= READ_BYTES_MAX;
    const all = isFull ? text : this.#text + text;
    this.#text = lastWhole(all.slice(-READ_BYTES_MAX), isFull || all.length > READ_BYTES_MAX);
    return { text: this.#text, isOpen };
  }
}

/**
 * Reports each new code: the current one, if there is one, and each later one. Reads do not overlap. However
 * fast the guest writes, they soon are PAUSE_MS_MAX apart.
 */
export class ExitWatch {
  readonly #source: ExitSource;
  readonly #onCode: (code: number) => void;
  readonly #onClose: () => void;
  #code: number | null = null;
  #reading: Promise<void> | null = null;
  #timer: NodeJS.Timeout | null = null;
  #pauseMs = PAUSE_MS_FIRST;
  #lastReadAtMs = Number.NEGATIVE_INFINITY;
  #isClosed = false;

  constructor(source: ExitSource, onCode: (code: number) => void, onClose: () => void = () => undefined) {
    this.#source = source;
    this.#onCode = onCode;
    this.#onClose = onClose;
    this.look();
  }

  /** Called when there may be new output. */
  look(): void {
    if (performance.now() - this.#lastReadAtMs > PAUSE_MS_MAX) this.#pauseMs = PAUSE_MS_FIRST;
    this.#schedule();
  }

  /** Reads at once what there is. Never rejects. */
  async drain(): Promise<void> {
    await this.#reading;
    await this.#read();
  }

  /** Idempotent. */
  close(): void {
    this.#isClosed = true;
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    this.#onClose();
  }

  #schedule(): void {
    if (this.#isClosed || this.#timer !== null) return;
    const dueAtMs = this.#lastReadAtMs + this.#pauseMs;
    this.#timer = setTimeout(
      () => {
        this.#timer = null;
        void this.#read();
      },
      Math.max(0, dueAtMs - performance.now()),
    );
    this.#timer.unref();
  }

  #read(): Promise<void> {
    if (this.#isClosed) return Promise.resolve();
    this.#reading ??= this.#readOnce().finally(() => {
      this.#reading = null;
    });
    return this.#reading;
  }

  async #readOnce(): Promise<void> {
    this.#lastReadAtMs = performance.now();
    // If the process does not answer, the keeper looks again when it is connected.
    const { text, isOpen } = await this.#source.read().catch(() => ({ text: '', isOpen: false }));
    if (this.#isClosed) return;
    this.#pauseMs = Math.min(this.#pauseMs * 2, PAUSE_MS_MAX);
    if (isOpen) this.#schedule();
    const code = parseExitCode(text);
    if (code === null || code === this.#code) return;
    this.#code = code;
    this.#onCode(code);
  }
}

/** Watches the exit port of a VM. The file is that of an earlier build, whose VMs have no other port. */
export function watchExitPort(
  process: Pick<VmProcess, 'takeExitText'>,
  path: string,
  onCode: (code: number) => void,
): ExitWatch {
  const inFile = { read: async () => ({ text: await fileEnd(path), isOpen: false }) };
  let file: FSWatcher;
  try {
    file = watch(path, { persistent: false });
  } catch {
    return new ExitWatch(new ProcessExitSource(process), onCode);
  }
  const exitWatch = new ExitWatch(inFile, onCode, () => file.close());
  file.on('change', () => exitWatch.look());
  file.on('error', () => file.close());
  return exitWatch;
}

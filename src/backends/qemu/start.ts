/** Starts QEMU in a session of its own with its output in a file, so that it outlives the daemon. */
import { type ChildProcess, spawn } from 'node:child_process';
import { type FileHandle, open } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { LIMITS, limitInText, limitOfError } from '../../domain/limits.js';
import { type ChildExit, identityOf, type ProcessIdentity } from '../../kit/process.js';
import type { VmPlace } from '../backend.js';
import { untilKept } from './launcher/launcher.js';

const OUTPUT_TAIL_BYTES = 2048;
/** When QEMU ends, it closes its QMP connection before all of its output is written. */
const OUTPUT_DELAY_MS = 100;

export interface StartedProcess {
  readonly identity: ProcessIdentity;
  /** Resolves when the process ends. It never rejects. */
  readonly exited: Promise<ChildExit>;
}

export interface StartOptions {
  readonly outputPath: string;
  readonly directory: string;
  /** All variables of the child except PATH. */
  readonly environment: Readonly<Record<string, string>>;
  /** Files that are opened for reading as the child's descriptors 3 and up. Each has a file position of its own. */
  readonly inputPaths?: readonly string[];
  /** Called at once, while the child has a single thread. */
  readonly onSpawned?: (pid: number) => void;
}

/** Throws QEMU_FAILED if the program cannot be started. */
export async function startDetached(
  program: string,
  args: readonly string[],
  options: StartOptions,
): Promise<StartedProcess> {
  const inputs: FileHandle[] = [];
  const output = await open(options.outputPath, 'a', 0o600);
  let child: ChildProcess;
  let exited: Promise<ChildExit>;
  try {
    for (const path of options.inputPaths ?? []) inputs.push(await open(path, 'r'));
    child = spawn(program, args, {
      detached: true,
      cwd: options.directory,
      stdio: ['ignore', output.fd, output.fd, ...inputs.map(({ fd }) => fd)],
      env: { PATH: process.env['PATH'] ?? '/usr/sbin:/usr/bin:/sbin:/bin', ...options.environment },
    });
    child.unref();
    if (child.pid !== undefined) options.onSpawned?.(child.pid);
    // The listeners are added before the first await, because these events come once.
    exited = new Promise((resolve) => child.once('exit', (code, signal) => resolve({ code, signal })));
    await new Promise<void>((resolve, reject) => {
      child.once('spawn', resolve);
      child.once('error', (cause) => reject(startError(program, cause)));
    });
  } finally {
    for (const input of inputs) await input.close();
    await output.close();
  }
  try {
    return { identity: await identityOf(child.pid ?? 0), exited };
  } catch (error) {
    // Nobody could find this process again, because no record names it.
    child.kill('SIGKILL');
    throw toMigrationError(error);
  }
}

function startError(program: string, cause: Error): MigrationError {
  if (limitOfError(cause) !== null) return toMigrationError(cause);
  return new MigrationError('QEMU_FAILED', `${program} cannot be started: ${cause.message}`, { cause });
}

/** Returns the end of the process's output. */
export async function outputTail(path: string): Promise<string> {
  const file = await open(path, 'r').catch(() => null);
  if (file === null) return '';
  try {
    const { size } = await file.stat();
    const length = Math.min(size, OUTPUT_TAIL_BYTES);
    const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, size - length);
    return buffer.subarray(0, bytesRead).toString('utf8').trim();
  } finally {
    await file.close();
  }
}

/** Returns `error`, with QEMU's last output if QEMU has ended. */
export async function withOutput(
  { directory, outputPath }: Pick<VmPlace, 'directory' | 'outputPath'>,
  error: MigrationError,
): Promise<MigrationError> {
  if (error.code !== 'QEMU_GONE' && error.code !== 'QEMU_FAILED') return error;
  await sleep(OUTPUT_DELAY_MS);
  if (error.code === 'QEMU_GONE') await untilKept(directory, OUTPUT_DELAY_MS);
  const words = await outputTail(outputPath);
  if (words === '') return error;
  return new MigrationError('QEMU_FAILED', `${error.message}: ${words}`, { ...saidBy(words), cause: error });
}

/** Returns what an error keeps of QEMU's last words: the words, and the limit of the host that they name. */
export function saidBy(words: string): { remedy?: string; details: object } {
  const limit = limitInText(words);
  return limit === null
    ? { details: { output: words } }
    : { remedy: LIMITS[limit].remedy, details: { output: words, limit } };
}

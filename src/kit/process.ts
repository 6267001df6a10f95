/**
 * QEMU as a process: started in its own session with its output in a file, so that it outlives the daemon; recognised
 * again by pid, start time and boot; ended and waited for. Signals go only to a process whose identity was checked just
 * before.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { type FileHandle, open, readdir, readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { standInLine } from '../agent/vm/priority.js';
import type { ProcessIdentity } from '../agent/vm/record.js';
import { MigrationError } from '../domain/errors.js';

const EXIT_POLL_MS = 5;
const OUTPUT_TAIL_BYTES = 2048;

export interface ChildExit {
  readonly code: number | null;
  readonly signal: string | null;
}

export interface StartedProcess {
  readonly identity: ProcessIdentity;
  /** Resolves when it ends; never rejects. */
  readonly exited: Promise<ChildExit>;
}

export interface StartOptions {
  readonly outputPath: string;
  readonly directory: string;
  /** All that the child gets besides PATH. */
  readonly environment: Readonly<Record<string, string>>;
  /** Opened for reading as the child's descriptors 3 and up, each with a position of its own. */
  readonly inputPaths?: readonly string[];
}

/** QEMU_FAILED if the program cannot be started at all. */
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
    if (child.pid !== undefined) standInLine(child.pid);
    // Listeners before anything is awaited: these events come once.
    exited = new Promise((resolve) => child.once('exit', (code, signal) => resolve({ code, signal })));
    await new Promise<void>((resolve, reject) => {
      child.once('spawn', resolve);
      child.once('error', (cause) =>
        reject(new MigrationError('QEMU_FAILED', `${program} cannot be started: ${cause.message}`, { cause })),
      );
    });
  } finally {
    for (const input of inputs) await input.close();
    await output.close();
  }
  const pid = child.pid ?? 0;
  // A process that has ended already is a zombie until Node reaps it, which is not before we yield: stat is there.
  const stat = await readStat(pid);
  return { identity: { pid, startTicks: stat?.startTicks ?? '0', bootId: await bootId() }, exited };
}

/** A zombie counts as dead. */
export async function isAlive(identity: ProcessIdentity): Promise<boolean> {
  const stat = await readStat(identity.pid);
  return (
    stat !== null && !stat.isZombie && stat.startTicks === identity.startTicks && identity.bootId === (await bootId())
  );
}

/** Sends the signal if this very process is still there. */
export async function signalProcess(identity: ProcessIdentity, signal: NodeJS.Signals): Promise<void> {
  if (!(await isAlive(identity))) return;
  try {
    process.kill(identity.pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** False if it is still there after `timeoutMs`. */
export async function waitForExit(identity: ProcessIdentity, timeoutMs: number): Promise<boolean> {
  const deadlineMs = performance.now() + timeoutMs;
  for (let waitMs = EXIT_POLL_MS; await isAlive(identity); waitMs = Math.min(waitMs * 2, 100)) {
    if (performance.now() >= deadlineMs) return false;
    await sleep(waitMs);
  }
  return true;
}

/** SIGTERM, and SIGKILL to one that does not end within `graceMs`. TIMEOUT if even that does not end it. */
export async function endProcess(identity: ProcessIdentity, graceMs: number): Promise<void> {
  if (graceMs > 0) {
    await signalProcess(identity, 'SIGTERM');
    if (await waitForExit(identity, graceMs)) return;
  }
  await signalProcess(identity, 'SIGKILL');
  if (!(await waitForExit(identity, 10_000))) {
    throw new MigrationError('TIMEOUT', `process ${identity.pid} does not end, not even by SIGKILL`);
  }
}

/**
 * Processes that have `argument` on their command line: finds a QEMU whose pid a crash kept from being written down.
 */
export async function findByArgument(argument: string): Promise<ProcessIdentity[]> {
  const boot = await bootId();
  const found: ProcessIdentity[] = [];
  for (const entry of await readdir('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    const commandLine = await readFile(`/proc/${entry}/cmdline`, 'utf8').catch(() => '');
    if (!commandLine.split('\0').includes(argument)) continue;
    const stat = await readStat(Number(entry));
    if (stat !== null && !stat.isZombie) found.push({ pid: Number(entry), startTicks: stat.startTicks, bootId: boot });
  }
  return found;
}

/** The end of what the process has written. */
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

let cachedBootId: string | null = null;

async function bootId(): Promise<string> {
  cachedBootId ??= (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();
  return cachedBootId;
}

async function readStat(pid: number): Promise<{ startTicks: string; isZombie: boolean } | null> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => null);
  if (stat === null) return null;
  // The second field is the program's name in brackets and may hold anything: count from the last bracket.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return { startTicks: fields[19] ?? '0', isZombie: fields[0] === 'Z' || fields[0] === 'X' };
}

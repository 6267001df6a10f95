/**
 * Processes that outlive the daemon: recognised again by pid, start time and boot; ended and waited for. Signals go
 * only to a process whose identity was checked just before.
 */
import { readdir, readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../domain/errors.js';
import { isOutOfDescriptors, readWithSpare } from './spare-descriptor.js';

const EXIT_POLL_MS = 5;

/** Which process it is. The three together never name another one, not even after a reboot. */
export interface ProcessIdentity {
  readonly pid: number;
  /** Field 22 of /proc/PID/stat: clock ticks since boot. */
  readonly startTicks: string;
  readonly bootId: string;
}

export interface ChildExit {
  readonly code: number | null;
  readonly signal: string | null;
}

/** Of a child that has just been made: one that has ended already is a zombie until Node reaps it, after a yield. */
export async function identityOf(pid: number): Promise<ProcessIdentity> {
  const stat = await readStat(pid);
  return { pid, startTicks: stat?.startTicks ?? '0', bootId: await bootId() };
}

/**
 * A zombie counts as dead. A process that cannot be looked at, for example for want of descriptors, does not: the call
 * throws, because its caller would free the memory of a process that lives.
 */
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

/** Processes that have `argument` on their command line. */
export async function findByArgument(argument: string): Promise<ProcessIdentity[]> {
  const boot = await bootId();
  const found: ProcessIdentity[] = [];
  for (const entry of await readdir('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    const commandLine = await readProc(`/proc/${entry}/cmdline`).catch((error: unknown) => {
      // A process that could not be looked at for want of descriptors may be the one that is sought.
      if (isOutOfDescriptors(error)) throw error;
      return '';
    });
    if (!commandLine.split('\0').includes(argument)) continue;
    const stat = await readStat(Number(entry));
    if (stat !== null && !stat.isZombie) found.push({ pid: Number(entry), startTicks: stat.startTicks, bootId: boot });
  }
  return found;
}

let cachedBootId: string | null = null;

async function bootId(): Promise<string> {
  cachedBootId ??= (await readProc('/proc/sys/kernel/random/boot_id')).trim();
  return cachedBootId;
}

async function readProc(path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if (!isOutOfDescriptors(error)) throw error;
    return readWithSpare(path);
  }
}

async function readStat(pid: number): Promise<{ startTicks: string; isZombie: boolean } | null> {
  const stat = await readProc(`/proc/${pid}/stat`).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT' || error.code === 'ESRCH') return null;
    throw error;
  });
  if (stat === null) return null;
  return { startTicks: fieldsOf(stat)[19] ?? '0', isZombie: hasEnded(stat) };
}

/**
 * True if the process with this /proc/PID/stat only waits to be reaped. Its other threads may live on when the first
 * one has ended: then the process has not.
 */
export function hasEnded(stat: string): boolean {
  const fields = fieldsOf(stat);
  return fields[0] === 'X' || (fields[0] === 'Z' && Number(fields[17] ?? 0) <= 1);
}

/** The fields from the third on. The second is the program's name in brackets, and may hold anything, brackets too. */
function fieldsOf(stat: string): readonly string[] {
  return stat.slice(stat.lastIndexOf(')') + 2).split(' ');
}

/**
 * The processes of the users of VMs. A guest that has broken out may leave some behind when its QEMU ends: then its
 * uid, its files and its name are free only when these have ended, too.
 */
import { readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError } from '../../domain/errors.js';
import { hasEnded } from '../../kit/process.js';

/** The uids from `from` on. No account of the host should have one of them. */
export interface QemuUsers {
  readonly from: number;
  /** 1: all VMs have the same user. */
  readonly count: number;
}

const END_MS_MAX = 10_000;
const POLL_MS = 10;
const GONE: readonly string[] = ['ENOENT', 'ESRCH'];

/** Returns which of these users have processes on this host. */
export function usersWithProcesses({ from, count }: QemuUsers): ReadonlySet<number> {
  return new Set(processes((uid) => uid >= from && uid < from + count).map(({ uid }) => uid));
}

/** Returns the name of the mount namespace of a process, which is that of its VM alone if it is contained. */
export function mountNamespaceOf(pid: number): string {
  try {
    return readlinkSync(`/proc/${pid}/ns/mnt`);
  } catch (cause) {
    throw new MigrationError('QEMU_GONE', `process ${pid} has ended`, { cause });
  }
}

/**
 * Ends all processes of the user in that mount namespace, which they cannot leave. Another daemon of this machine may
 * have the same user. Throws TIMEOUT if they do not end.
 */
export async function endProcessesOf(user: number, mountNamespace: string): Promise<void> {
  const deadlineMs = performance.now() + END_MS_MAX;
  for (;;) {
    const left = processes((uid) => uid === user).filter(({ pid }) => isIn(mountNamespace, pid));
    if (left.length === 0) return;
    for (const { pid } of left) kill(pid);
    if (performance.now() > deadlineMs) {
      const pids = left.map(({ pid }) => pid).join(', ');
      throw new MigrationError('TIMEOUT', `processes of user ${user} do not end, not even by SIGKILL: ${pids}`);
    }
    await sleep(POLL_MS);
  }
}

/** The first thread may have ended, and with it what the kernel tells of the process: its other threads count. */
function isIn(mountNamespace: string, pid: number): boolean {
  try {
    return readdirSync(`/proc/${pid}/task`).some((thread) => {
      try {
        return readlinkSync(`/proc/${pid}/task/${thread}/ns/mnt`) === mountNamespace;
      } catch (error) {
        throwUnlessGone(error);
        return false;
      }
    });
  } catch (error) {
    throwUnlessGone(error);
    return false;
  }
}

/** That there are no descriptors left, for example, does not say that a process has ended. */
function throwUnlessGone(error: unknown): void {
  if (!GONE.includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
}

function processes(isOf: (uid: number) => boolean): { pid: number; uid: number }[] {
  const found: { pid: number; uid: number }[] = [];
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    try {
      const { uid } = statSync(`/proc/${name}`);
      if (isOf(uid) && !hasEnded(readFileSync(`/proc/${name}/stat`, 'utf8'))) found.push({ pid: Number(name), uid });
    } catch (error) {
      throwUnlessGone(error);
    }
  }
  return found;
}

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch {
    // It has ended.
  }
}

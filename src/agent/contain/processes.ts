/**
 * The processes of the users of VMs. A guest that has broken out may leave some behind when its QEMU ends: then its
 * uid, its files and its name are free only when these have ended, too.
 */
import { readdirSync, readFileSync, statSync } from 'node:fs';
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

/** Returns which of these users have processes on this host. */
export function usersWithProcesses({ from, count }: QemuUsers): ReadonlySet<number> {
  return new Set(processes((uid) => uid >= from && uid < from + count).map(({ uid }) => uid));
}

/** Ends all processes of the user, which no other VM may have. Throws TIMEOUT if they do not end. */
export async function endProcessesOf(user: number): Promise<void> {
  const deadlineMs = performance.now() + END_MS_MAX;
  for (;;) {
    const left = processes((uid) => uid === user);
    if (left.length === 0) return;
    for (const { pid } of left) kill(pid);
    if (performance.now() > deadlineMs) {
      const pids = left.map(({ pid }) => pid).join(', ');
      throw new MigrationError('TIMEOUT', `processes of user ${user} do not end, not even by SIGKILL: ${pids}`);
    }
    await sleep(POLL_MS);
  }
}

function processes(isOf: (uid: number) => boolean): { pid: number; uid: number }[] {
  const found: { pid: number; uid: number }[] = [];
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    try {
      const { uid } = statSync(`/proc/${name}`);
      if (isOf(uid) && !hasEnded(readFileSync(`/proc/${name}/stat`, 'utf8'))) found.push({ pid: Number(name), uid });
    } catch {
      // It has ended meanwhile.
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

/**
 * Scheduling priorities, for hosts whose guests keep all processors busy. The daemon has a higher priority than the
 * guests: a call of a switchover or a fork is a few milliseconds of work, and each step of it would otherwise wait
 * behind every busy guest. A clone's QEMU has the same priority while it loads the image's state.
 *
 * The kernel uses the nice value of the thread. With sched_autogroup it compares sessions by the nice value of their
 * group, and the thread's own value counts only within its session. The daemon leads a session of its own if its
 * starter has made one, as service managers do. A QEMU always leads one. If the kernel refuses a change, the priority
 * stays as it was.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { getPriority, setPriority } from 'node:os';

const AHEAD_NICE = 10;
const NICE_MIN = -20;

/** The nice value of this process at its start, which its children get as well. */
let startNice: number | null = null;

/** Raises the priority of all threads of this process. */
export function raiseDaemonPriority(): void {
  startNice ??= getPriority();
  const nice = Math.max(NICE_MIN, startNice - AHEAD_NICE);
  attempt(() => {
    for (const thread of readdirSync('/proc/self/task')) setPriority(Number(thread), nice);
  });
  attempt(() => {
    if (isSessionLeader()) writeFileSync('/proc/self/autogroup', `${-AHEAD_NICE}`);
  });
}

/** Gives a new child the nice value that this process had at its start. The child must not have other threads yet. */
export function resetChildPriority(pid: number): void {
  const nice = startNice;
  if (nice !== null) attempt(() => setPriority(pid, nice));
}

/** Raises the priority of a QEMU's main thread. Its vCPUs, which do not run yet, keep theirs. */
export function raisePriority(pid: number): void {
  setBoth(pid, -AHEAD_NICE);
}

/** Undoes `raisePriority`, when the guest runs. */
export function restorePriority(pid: number): void {
  setBoth(pid, 0);
}

function setBoth(pid: number, change: number): void {
  attempt(() => setPriority(pid, Math.max(NICE_MIN, (startNice ?? getPriority()) + change)));
  attempt(() => writeFileSync(`/proc/${pid}/autogroup`, `${change}`));
}

function isSessionLeader(): boolean {
  const stat = readFileSync('/proc/self/stat', 'utf8');
  // The fields after the name in parentheses are: state, parent, group, session.
  return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[3]) === process.pid;
}

/** Ignores errors, because a priority affects only speed. */
function attempt(change: () => void): void {
  try {
    change();
  } catch {
    // The change is not permitted, the kernel does not support it, or the process has ended.
  }
}

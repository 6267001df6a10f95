/**
 * Who gets a processor first where guests take all of them. The daemon goes ahead of them: the calls of a switchover or
 * a fork are a few milliseconds of work, and each step of them would wait for a turn behind every busy guest. So does a
 * clone's QEMU between the image and its first instruction.
 *
 * Two things decide: a thread's nice value, and where the kernel groups by session (sched_autogroup) that of the group,
 * beside which the former counts only among the session's own threads. A daemon is in a session of its own if whatever
 * started it has made one, as service managers do; a QEMU always is. Where none of this is allowed things go on as they
 * would have.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { getPriority, setPriority } from 'node:os';

const AHEAD_NICE = 10;
const NICE_MIN = -20;

/** What children begin with, whatever becomes of this process. */
let startNice: number | null = null;

/** This process, all its threads. */
export function goAhead(): void {
  startNice ??= getPriority();
  const nice = Math.max(NICE_MIN, startNice - AHEAD_NICE);
  attempt(() => {
    for (const thread of readdirSync('/proc/self/task')) setPriority(Number(thread), nice);
  });
  attempt(() => {
    if (isSessionLeader()) writeFileSync('/proc/self/autogroup', `${-AHEAD_NICE}`);
  });
}

/** A child that has just been made: it has this process's nice value, and not yet a thread. */
export function standInLine(pid: number): void {
  const nice = startNice;
  if (nice !== null) attempt(() => setPriority(pid, nice));
}

/** A QEMU that has everybody waiting: its main thread, not its vCPUs, which do not run yet. */
export function hasten(pid: number): void {
  setBoth(pid, -AHEAD_NICE);
}

/** The same when its guest runs. */
export function unhasten(pid: number): void {
  setBoth(pid, 0);
}

function setBoth(pid: number, change: number): void {
  attempt(() => setPriority(pid, Math.max(NICE_MIN, (startNice ?? getPriority()) + change)));
  attempt(() => writeFileSync(`/proc/${pid}/autogroup`, `${change}`));
}

function isSessionLeader(): boolean {
  const stat = readFileSync('/proc/self/stat', 'utf8');
  // Behind the name in brackets: state, parent, group, session.
  return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[3]) === process.pid;
}

/** Priorities make things faster or slower, never right or wrong. */
function attempt(change: () => void): void {
  try {
    change();
  } catch {
    // not allowed, not known to this kernel, or the process has ended
  }
}

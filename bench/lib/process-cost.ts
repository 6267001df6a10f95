/** Measures processes from /proc: CPU time without vCPUs, memory that they do not share, page faults. */
import { readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';

const NS_PER_S = 1e9;
const KIB = 1024;

/**
 * Gives this process's session priority over the guests. Otherwise a sample would be taken only when the scheduler has
 * run all of them. Returns a function that restores the priority. It has no effect if the kernel does not group by
 * session, or does not permit it.
 */
export function lookAhead(): () => void {
  const set = (nice: number): void => {
    try {
      writeFileSync('/proc/self/autogroup', `${nice}`);
    } catch {
      // The samples are then taken later.
    }
  };
  set(-20);
  return () => set(0);
}

/** Returns the pids of QEMUs with this text on their command line, read synchronously. */
export function qemusOf(text: string): number[] {
  const isOne = (entry: string): boolean => {
    try {
      return (
        readlinkSync(`/proc/${entry}/exe`).includes('qemu-system') &&
        readFileSync(`/proc/${entry}/cmdline`, 'utf8').includes(text)
      );
    } catch {
      return false;
    }
  };
  return readdirSync('/proc')
    .filter((entry) => /^\d+$/.test(entry) && isOne(entry))
    .map(Number);
}

interface ThreadTime {
  readonly isVcpu: boolean;
  readonly ns: number;
}

function threads(pid: number): ThreadTime[] {
  try {
    return readdirSync(`/proc/${pid}/task`).map((thread) => {
      const task = `/proc/${pid}/task/${thread}`;
      // QEMU names vCPU threads `CPU 0/TCG` (debug-threads=on). The time is in nanoseconds, because a clone costs less
      // than a tick of /proc/PID/stat.
      const isVcpu = readFileSync(`${task}/comm`, 'utf8').startsWith('CPU ');
      return { isVcpu, ns: Number(readFileSync(`${task}/schedstat`, 'utf8').split(' ')[0]) };
    });
  } catch {
    return [];
  }
}

/**
 * Returns the CPU seconds that these processes have used since their start, without vCPU threads: those run the guest.
 */
export function cpuSeconds(pids: readonly number[]): number {
  const all = pids.flatMap(threads).filter(({ isVcpu }) => !isVcpu);
  return all.reduce((sum, { ns }) => sum + ns, 0) / NS_PER_S;
}

/**
 * Returns the bytes of anonymous memory, that is without pages of files that other processes map too. Pages of an image
 * count once they have been written.
 */
export function privateBytes(pid: number): number {
  try {
    const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
    return Number(/^Anonymous:\s+(\d+)/m.exec(rollup)?.[1] ?? 0) * KIB;
  } catch {
    return 0;
  }
}

export function minorFaults(pid: number): number {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[7]);
  } catch {
    return 0;
  }
}

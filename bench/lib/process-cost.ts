/** What processes cost, from /proc: processor time but for vCPUs, memory that they share with nobody, page faults. */
import { readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';

const NS_PER_S = 1e9;
const KIB = 1024;

/**
 * Puts this process's session ahead of the guests, or what is to be seen at one moment would be looked at when its turn
 * comes behind all of them. Returns what puts it back. Nothing happens where the kernel does not group by session, or
 * does not allow it.
 */
export function lookAhead(): () => void {
  const set = (nice: number): void => {
    try {
      writeFileSync('/proc/self/autogroup', `${nice}`);
    } catch {
      // the figures are of a later moment then
    }
  };
  set(-20);
  return () => set(0);
}

/** QEMUs with this text on their command line, read at once. */
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
      // QEMU names them (debug-threads=on): `CPU 0/TCG`. Time in nanoseconds: a clone costs less than a tick of the
      // others' clock.
      const isVcpu = readFileSync(`${task}/comm`, 'utf8').startsWith('CPU ');
      return { isVcpu, ns: Number(readFileSync(`${task}/schedstat`, 'utf8').split(' ')[0]) };
    });
  } catch {
    return [];
  }
}

/** Seconds that these processes have used since their start, vCPU threads aside: those run the guest. */
export function cpuSeconds(pids: readonly number[]): number {
  const all = pids.flatMap(threads).filter(({ isVcpu }) => !isVcpu);
  return all.reduce((sum, { ns }) => sum + ns, 0) / NS_PER_S;
}

/**
 * Bytes of anonymous memory: what is not a page of a file that others map too. Pages of an image count once they have
 * been written.
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

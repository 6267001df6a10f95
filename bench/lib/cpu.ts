import { readdirSync, readFileSync } from 'node:fs';

const TICKS_PER_S = 100;
/** The interval is short enough to see threads that exist only during a move. */
export const SAMPLE_MS = 50;

function ticks(statPath: string): number {
  const text = readFileSync(statPath, 'utf8');
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  return Number(fields[11]) + Number(fields[12]);
}

/**
 * Measures the CPU seconds of a move on one host: those of the daemon, and of QEMU without its vCPU threads, which run
 * the guest in any case. A process may end during the move, so the last values seen are kept; call `sample` regularly.
 */
export class CpuMeter {
  private readonly first = new Map<string, number>();
  private readonly last = new Map<string, number>();

  constructor(private readonly processes: () => readonly { pid: number; vcpuThreads: readonly number[] }[]) {
    this.sample();
    for (const [key, value] of this.last) this.first.set(key, value);
  }

  sample(): void {
    for (const { pid, vcpuThreads } of this.processes()) {
      try {
        for (const thread of readdirSync(`/proc/${pid}/task`)) {
          if (!vcpuThreads.includes(Number(thread)))
            this.last.set(`${pid}/${thread}`, ticks(`/proc/${pid}/task/${thread}/stat`));
        }
      } catch {
        // The process or one of its threads has ended; the last values seen count.
      }
    }
  }

  seconds(): number {
    this.sample();
    let sum = 0;
    for (const [key, value] of this.last) sum += value - (this.first.get(key) ?? 0);
    return sum / TICKS_PER_S;
  }
}

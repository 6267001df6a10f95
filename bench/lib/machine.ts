import { readFileSync } from 'node:fs';
import { cpus, release, totalmem } from 'node:os';

/** The machine on which figures were measured; every result states it. */
export interface Machine {
  readonly cpu: string;
  readonly cores: number;
  readonly memoryMiB: number;
  readonly kernel: string;
  readonly loadAverage: string;
  readonly date: string;
}

export function describeMachine(): Machine {
  const processors = cpus();
  return {
    cpu: processors[0]?.model ?? 'unknown',
    cores: processors.length,
    memoryMiB: Math.round(totalmem() / (1 << 20)),
    kernel: release(),
    loadAverage: readFileSync('/proc/loadavg', 'utf8').split(' ').slice(0, 3).join(' '),
    date: new Date().toISOString(),
  };
}

export function describeRun({ cpu, cores, memoryMiB, kernel }: Machine, rounds: number): string {
  return `${cpu}, ${cores} cores, ${memoryMiB} MiB, Linux ${kernel}; ${rounds} rounds, medians (min–max)`;
}

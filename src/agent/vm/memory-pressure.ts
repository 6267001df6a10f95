/**
 * Measures how short of memory this host is: the available memory and, if the kernel has PSI, the share of time that
 * tasks wait for memory.
 */
import { readFile } from 'node:fs/promises';
import { memoryAvailableBytes } from './ram-files.js';

export interface MemoryReading {
  readonly availableBytes: number;
  /** The share of the last 10 s in which some task waited for memory. Null on a kernel without PSI. */
  readonly stallPercent: number | null;
}

export interface MemoryBounds {
  readonly memoryAvailableBytesMin: number;
  readonly memoryStallPercentMax: number;
}

/** short: the pool must end its waiting QEMUs. tight: the pool must not add any. */
export type MemoryState = 'ample' | 'tight' | 'short';

/**
 * The average of 10 s falls slowly. The gap between `short` and `ample` keeps sets that have just been ended from being
 * made again at once.
 */
const TIGHT_SHARE = 0.5;

export function memoryState({ availableBytes, stallPercent }: MemoryReading, bounds: MemoryBounds): MemoryState {
  const { memoryAvailableBytesMin, memoryStallPercentMax } = bounds;
  const stalled = stallPercent ?? 0;
  if (availableBytes < memoryAvailableBytesMin || stalled > memoryStallPercentMax) return 'short';
  return stalled > memoryStallPercentMax * TIGHT_SHARE ? 'tight' : 'ample';
}

/** Parses the text of /proc/pressure/memory. Returns null for any other text. */
export function parseStallPercent(text: string): number | null {
  const match = /^some avg10=(\d{1,3}(?:\.\d+)?) /m.exec(text);
  return match === null ? null : Number(match[1]);
}

export async function readMemory(): Promise<MemoryReading> {
  // Reading fails if the kernel is built without PSI or if PSI is switched off at boot.
  const pressure = await readFile('/proc/pressure/memory', 'utf8').catch(() => '');
  return { availableBytes: await memoryAvailableBytes(), stallPercent: parseStallPercent(pressure) };
}

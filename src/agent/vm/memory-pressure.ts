/**
 * How short of memory this host is: what it has available, and, where the kernel says so (PSI), how much time is lost
 * to waiting for memory.
 */
import { readFile } from 'node:fs/promises';
import { memoryAvailableBytes } from './ram-files.js';

export interface MemoryReading {
  readonly availableBytes: number;
  /** Of the last 10 s, the share in which some task waited for memory. null: a kernel without PSI. */
  readonly stallPercent: number | null;
}

export interface MemoryBounds {
  readonly memoryAvailableBytesMin: number;
  readonly memoryStallPercentMax: number;
}

/** short: what only might be of use has to go. tight: nothing of the kind is added. */
export type MemoryState = 'ample' | 'tight' | 'short';

/**
 * The average of 10 s is slow to fall; without a gap between going and coming back, what has gone would come back in
 * the next moment.
 */
const TIGHT_SHARE = 0.5;

export function memoryState({ availableBytes, stallPercent }: MemoryReading, bounds: MemoryBounds): MemoryState {
  const { memoryAvailableBytesMin, memoryStallPercentMax } = bounds;
  const stalled = stallPercent ?? 0;
  if (availableBytes < memoryAvailableBytesMin || stalled > memoryStallPercentMax) return 'short';
  return stalled > memoryStallPercentMax * TIGHT_SHARE ? 'tight' : 'ample';
}

/** From the text of /proc/pressure/memory; null for anything else. */
export function parseStallPercent(text: string): number | null {
  const match = /^some avg10=(\d{1,3}(?:\.\d+)?) /m.exec(text);
  return match === null ? null : Number(match[1]);
}

export async function readMemory(): Promise<MemoryReading> {
  // Not built in, or switched off at boot: reading it fails then.
  const pressure = await readFile('/proc/pressure/memory', 'utf8').catch(() => '');
  return { availableBytes: await memoryAvailableBytes(), stallPercent: parseStallPercent(pressure) };
}

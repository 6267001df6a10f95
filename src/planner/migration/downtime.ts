/**
 * Decides for a pre-copy whether what is left can be fetched while the VM stands still, in the downtime that the
 * request allows. Pure.
 */
import { bringsAllFirst, type MigrationRequest } from '../../domain/migration.js';
import type { Refusal } from '../../domain/refusal.js';

/**
 * What stopping, the device state, the commit and the resume take on a busy machine. It is 11 to 20 ms on an idle one
 * (docs/BENCHMARKS.md).
 */
const SWITCH_MS = 30;
/** The page tables are read twice while the VM stands still, each time up to 3 ms for each GiB. */
const SCAN_MS_PER_GIB = 6;
/** The VM writes on from the end of a round until it stops. */
const STOP_MS = 20;
/** Rounds may get longer by chance. After so many without a better one, the next ones will not be better either. */
const ROUNDS_WITHOUT_GAIN_MAX = 4;
const ROUNDS_MAX = 30;
const GIB = 2 ** 30;

/** What has been fetched, and how long it took. */
export interface Pass {
  readonly bytes: number;
  readonly ms: number;
}

export interface PushTrace {
  /** The first fetches all of the memory, each other one what the round before it has found. At least one. */
  readonly passes: readonly Pass[];
  /** For each pass, what the VM had written meanwhile: it has to be fetched again. */
  readonly dirtyBytes: readonly number[];
}

export type PrecopyMove =
  | { readonly kind: 'push' }
  | { readonly kind: 'switch'; readonly fetchedBytesPerS: number }
  /** The VM writes too fast. */
  | { readonly kind: 'giveUp'; readonly best: Standstill };

/** What a switchover after a round would have needed. */
export interface Standstill {
  readonly neededMs: number;
  readonly writtenBytesPerS: number;
  readonly fetchedBytesPerS: number;
}

export interface DowntimeBound {
  readonly downtimeMsMax: number;
  readonly memoryBytes: number;
}

/** The part of the downtime that is no fetching. */
export function switchMs(memoryBytes: number): number {
  return SWITCH_MS + Math.ceil((SCAN_MS_PER_GIB * memoryBytes) / GIB);
}

/** Whether to fetch again, to stop the VM, or to leave it where it is. Ends after at most 30 rounds. */
export function nextPrecopyMove(trace: PushTrace, { downtimeMsMax, memoryBytes }: DowntimeBound): PrecopyMove {
  const rounds = trace.dirtyBytes.map((_, index) => standstillAfter(trace, index, memoryBytes));
  const last = rounds.at(-1);
  if (last === undefined) return { kind: 'push' };
  if (last.neededMs <= downtimeMsMax) return { kind: 'switch', fetchedBytesPerS: last.fetchedBytesPerS };
  const best = rounds.reduce((one, other) => (other.neededMs < one.neededMs ? other : one));
  const isHopeless = rounds.length - 1 - rounds.indexOf(best) >= ROUNDS_WITHOUT_GAIN_MAX;
  return isHopeless || rounds.length >= ROUNDS_MAX ? { kind: 'giveUp', best } : { kind: 'push' };
}

/** `index`: of the round after which the VM would be stopped. */
function standstillAfter({ passes, dirtyBytes }: PushTrace, index: number, memoryBytes: number): Standstill {
  const done = passes.slice(0, index + 1);
  const fetchedMs = done.reduce((sum, { ms }) => sum + ms, 0);
  const fetchedBytes = done.reduce((sum, { bytes }) => sum + bytes, 0);
  const written = dirtyBytes[index] ?? 0;
  const passMs = Math.max(1, passes[index]?.ms ?? 1);
  const writtenBytesPerS = (written * 1000) / passMs;
  // Of a VM that has next to no memory in use, nothing was fetched by which a rate could be known.
  const fetchedBytesPerS = (Math.max(1, fetchedBytes) * 1000) / Math.max(1, fetchedMs);
  const leftBytes = written === 0 ? 0 : written + (writtenBytesPerS * STOP_MS) / 1000;
  const neededMs = Math.ceil(switchMs(memoryBytes) + (leftBytes * 1000) / fetchedBytesPerS);
  return { neededMs, writtenBytesPerS, fetchedBytesPerS };
}

/** No VM, however idle, moves in less time than the switchover takes. */
export function* checkDowntime({ mode, vm, downtimeMsMax }: MigrationRequest, memoryBytes: number): Iterable<Refusal> {
  const leastMs = switchMs(memoryBytes);
  if (!bringsAllFirst(mode) || downtimeMsMax > leastMs) return;
  yield {
    code: 'DOWNTIME_TOO_SHORT',
    reason: `${vm} may stand still for ${downtimeMsMax} ms, and the switchover alone may take ${leastMs} ms`,
    remedy: `use --max-downtime ${leastMs + 1} or more, or --hybrid`,
  };
}

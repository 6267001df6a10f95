/**
 * What the target knows of a VM that arrives, from its own session alone: also while the coordinator is away. Reading
 * it costs a snapshot of the native counters, and nothing is read unless somebody asks.
 */
import type { MigrationError } from '../../domain/errors.js';
import type { VmSpec } from '../../domain/vm.js';
import type { Clock } from '../../engine/ports/clock.js';
import type { PrepareRequest, SessionState } from '../../engine/ports/session.js';
import type { TargetSnapshot } from '../../native/types.js';

/** Nothing may arrive for this long before the move counts as stalled: longer than any pause of a slow prefetch. */
const QUIET_MS_MAX = 10_000;

export interface ArrivalReading {
  /** Null: QEMU moves the memory itself, and only the source's QEMU knows how far it is. */
  readonly state: SessionState | null;
  readonly hasRun: boolean;
  readonly pagesTotal: number;
  readonly pagesPresent: number;
  readonly bytesDone: number;
  readonly faultCount: number;
  readonly error: MigrationError | null;
}

export interface ArrivalView extends ArrivalReading {
  readonly request: PrepareRequest;
  readonly preparedAt: string;
  readonly incompleteSince: string | null;
  /** How long nothing has arrived, as far as anybody has looked. */
  readonly quietMs: number;
  readonly isStalled: boolean;
}

/** The states in which missing pages cannot come until something else happens. */
const STANDING: ReadonlySet<SessionState | null> = new Set(['disconnected', 'failed', 'gone']);

export class Arrival {
  readonly #request: PrepareRequest;
  readonly #clock: Clock;
  readonly #preparedAt: string;
  #incompleteSince: string | null;
  #pagesPresent = -1;
  #advancedAtMs: number;

  /** `known`: the times of a session that an earlier daemon has begun. */
  constructor(request: PrepareRequest, clock: Clock, known: { preparedAt?: string; resumedAt?: string } = {}) {
    this.#request = request;
    this.#clock = clock;
    this.#preparedAt = known.preparedAt ?? clock.isoNow();
    this.#incompleteSince = known.resumedAt ?? null;
    this.#advancedAtMs = clock.nowMs();
  }

  /** Notes that the VM runs here now. Returns the time since when it does; the first one counts. */
  began(): string {
    this.#incompleteSince ??= this.#clock.isoNow();
    return this.#incompleteSince;
  }

  view(reading: ArrivalReading): ArrivalView {
    const nowMs = this.#clock.nowMs();
    if (reading.pagesPresent > this.#pagesPresent || !reading.hasRun) {
      this.#pagesPresent = reading.pagesPresent;
      this.#advancedAtMs = nowMs;
    }
    if (reading.hasRun) this.began();
    const quietMs = nowMs - this.#advancedAtMs;
    const isStalled =
      reading.hasRun && (STANDING.has(reading.state) || (reading.state !== null && quietMs > QUIET_MS_MAX));
    return {
      ...reading,
      request: this.#request,
      preparedAt: this.#preparedAt,
      incompleteSince: reading.hasRun ? this.#incompleteSince : null,
      quietMs,
      isStalled,
    };
  }
}

/** Counts the pages that have arrived: all of them if the session `isComplete`, whatever its last snapshot says. */
export function pagesOf(snapshot: TargetSnapshot | null, { memory }: VmSpec, isComplete: boolean) {
  const counters: Record<string, number> = {};
  for (const [name, value] of Object.entries(snapshot?.counters ?? {})) counters[name] = Number(value);
  const pagesTotal = memory.sizeBytes / memory.pageBytes;
  const { pagesPresent = 0, pagesZero = 0 } = counters;
  return {
    failure: snapshot?.failure ?? null,
    pagesTotal,
    pagesPresent: isComplete ? pagesTotal : pagesPresent + pagesZero,
    counters,
  };
}

/** Whole per cent, and 100 only if nothing is missing. */
export function percentOf({ state, pagesTotal, pagesPresent }: ArrivalReading): number | null {
  if (state === null || pagesTotal === 0) return null;
  return Math.min(pagesPresent < pagesTotal ? 99 : 100, Math.floor((100 * pagesPresent) / pagesTotal));
}

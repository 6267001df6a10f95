/** Turns the agents' readings of work under way into the progress that a job shows. */
import { MigrationError } from '../domain/errors.js';
import type { MigrationProgress } from '../domain/progress.js';

export interface ProgressReading {
  readonly pagesTotal: number;
  readonly pagesDone: number;
  readonly pageBytes: number;
  /** Bytes left, if known better than from the number of pages. */
  readonly bytesLeft?: number;
  readonly bytesDone: number;
  readonly bytesPerS: number;
  readonly faultCount: number;
}

export function describeProgress(reading: ProgressReading): MigrationProgress {
  const { pagesTotal, pagesDone, pageBytes, bytesDone, bytesPerS, faultCount } = reading;
  const bytesLeft = reading.bytesLeft ?? Math.max(0, pagesTotal - pagesDone) * pageBytes;
  return {
    pagesTotal,
    pagesDone,
    bytesDone,
    bytesPerS: Math.round(bytesPerS),
    secondsLeft: bytesLeft === 0 ? 0 : bytesPerS > 0 ? bytesLeft / bytesPerS : null,
    faultCount,
  };
}

/** Returns the error of a reading, which may be JSON from another host. */
export function troubleOf({ error }: { readonly error: unknown }, where: string): MigrationError | undefined {
  return error === null || error === undefined ? undefined : MigrationError.from(error, where);
}

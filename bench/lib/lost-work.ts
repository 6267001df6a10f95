/**
 * Lost work: how much of a guest's work a move has cost, as the time in which the guest does that work at its usual
 * rate. It is the blackout, and for each of the guest's windows outside of it (1 - rate / usual rate) × window, but not
 * less than 0. It counts from the request until 3 s after the resume. A guest that is not moved loses work, too, for
 * its rate varies: that sum is the noise floor of the measure.
 */
import type { WorkWindow } from '../../test/hosts/guest.js';
import { median } from './stats.js';

/** By the guest's clock, which stands still in the blackout. */
export const LOST_WORK_AFTER_MS = 3000;
const USUAL_WINDOWS = 15;

export interface LostWork {
  /** From the request until the source stops. */
  readonly before: number;
  readonly blackout: number;
  readonly after: number;
}

export const lostWorkSumMs = ({ before, blackout, after }: LostWork): number => before + blackout + after;

/** Operations per millisecond, before anything happens to the guest. */
export function usualRate(windows: readonly WorkWindow[]): number {
  return median(windows.slice(-USUAL_WINDOWS).map(({ ops, windowMs }) => ops / windowMs));
}

/** Returns the milliseconds of work that are missing in the windows that begin within `spanMs`. */
export function missingWorkMs(windows: readonly WorkWindow[], rate: number, spanMs = Number.POSITIVE_INFINITY): number {
  let [missingMs, atMs] = [0, 0];
  for (const { ops, windowMs } of windows) {
    if (atMs >= spanMs) break;
    atMs += windowMs;
    missingMs += Math.max(0, windowMs - ops / rate);
  }
  return missingMs;
}

export interface MovedWindows {
  /** Up to the request. */
  readonly before: readonly WorkWindow[];
  /** On the source, from the request on. */
  readonly source: readonly WorkWindow[];
  /** The one in which the guest was moved is the first. */
  readonly target: readonly WorkWindow[];
  readonly blackoutMs: number;
}

export function lostWork({ before, source, target, blackoutMs }: MovedWindows): LostWork {
  const rate = usualRate(before);
  return {
    before: missingWorkMs(source, rate),
    blackout: blackoutMs,
    after: missingWorkMs(target, rate, LOST_WORK_AFTER_MS),
  };
}

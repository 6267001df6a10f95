import { closeSync, openSync, readFileSync } from 'node:fs';
import { parseWork, type WorkWindow } from '../../test/hosts/guest.js';
import { usualRate } from './lost-work.js';

export function readWork(serialLog: string): WorkWindow[] {
  try {
    return parseWork(readFileSync(serialLog, 'utf8'));
  } catch {
    return [];
  }
}

/** The serial log of a guest that is about to leave: its file can be read on when nobody names it any more. */
export class LeavingLog {
  readonly #file: number;
  readonly #path: string;

  constructor(path: string) {
    this.#file = openSync(path, 'r');
    this.#path = `/proc/self/fd/${this.#file}`;
  }

  /** The windows so far. */
  work(): WorkWindow[] {
    return readWork(this.#path);
  }

  close(): void {
    closeSync(this.#file);
  }
}

export interface RateAfter {
  /** Time from resume until three windows in a row reach 90 % of the rate before, by the guest's clock. */
  readonly degradedMs: number;
  readonly stallMsMax: number;
  readonly isRecovered: boolean;
}

/**
 * Compares the work windows `before` (on the source) with those `after` (on the target). The guest's clock stops during
 * the blackout.
 */
export function rateAfter(before: readonly WorkWindow[], after: readonly WorkWindow[]): RateAfter {
  const base = usualRate(before);
  let degradedMs = 0;
  let isRecovered = false;
  for (let n = 0; n + 3 <= after.length; n++) {
    if (after.slice(n, n + 3).every((window) => window.ops / window.windowMs >= 0.9 * base)) {
      isRecovered = true;
      break;
    }
    degradedMs += (after[n] as WorkWindow).windowMs;
  }
  return { degradedMs, stallMsMax: Math.max(0, ...after.slice(0, 40).map((window) => window.gapMs)), isRecovered };
}

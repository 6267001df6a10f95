import { readFileSync } from 'node:fs';
import { parseWork, type WorkWindow } from '../../test/hosts/guest.js';
import { median } from './stats.js';

export function readWork(serialLog: string): WorkWindow[] {
  try {
    return parseWork(readFileSync(serialLog, 'utf8'));
  } catch {
    return [];
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
  const base = median(before.slice(-15).map((window) => window.ops / window.windowMs));
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

import { describe, expect, test } from 'vitest';
import { lostWork, lostWorkSumMs, missingWorkMs, usualRate } from '../../../bench/lib/lost-work.js';
import type { WorkWindow } from '../../hosts/guest.js';

/** Windows of 100 ms, each with this share of the work that the guest does at its usual rate. */
const windows = (...shares: readonly number[]): WorkWindow[] =>
  shares.map((share, n) => ({ timeS: n / 10, windowMs: 100, ops: 1000 * share, gapMs: 0, bad: 0 }));
const steady = (count: number) => windows(...Array.from({ length: count }, () => 1));

describe('lost work', () => {
  test('is the blackout and what is missing before and after', () => {
    const moved = { before: steady(20), source: windows(1, 0.5, 0.9), target: windows(0, 0.25, 1), blackoutMs: 12 };
    const lost = lostWork(moved);
    expect(lost).toEqual({ before: 60, blackout: 12, after: 175 });
    expect(lostWorkSumMs(lost)).toBe(247);
  });

  test('is not made up for by faster windows', () => {
    expect(missingWorkMs(windows(2, 0.5, 3), usualRate(steady(15)))).toBe(50);
  });

  test('ends 3 s after the resume', () => {
    const target = [...steady(29), ...windows(0.5, 0, 0)];
    expect(lostWork({ before: steady(15), source: [], target, blackoutMs: 0 }).after).toBe(50);
  });

  test('is against the rate just before the request', () => {
    const before = [...windows(...Array.from({ length: 20 }, () => 3)), ...steady(15)];
    expect(lostWorkSumMs(lostWork({ before, source: steady(3), target: steady(3), blackoutMs: 0 }))).toBe(0);
  });

  test('counts a window by its own length', () => {
    const [window] = windows(1) as [WorkWindow];
    expect(missingWorkMs([{ ...window, windowMs: 400 }], usualRate(steady(15)))).toBe(300);
  });
});

import { expect, test } from 'vitest';
import { parseDuration } from '../../../src/kit/duration.js';
import { LogLimit } from '../../../src/kit/log-limit.js';

test('a flood of lines is cut, and the next line says how many were left out', () => {
  let nowMs = 0;
  const lines: object[] = [];
  const limit = new LogLimit(3, () => nowMs);
  const flood = (count: number) => {
    for (let line = 0; line < count; line++) limit.log((omitted) => lines.push(omitted));
  };
  flood(100);
  expect(lines).toEqual([{}, {}, {}]);
  nowMs = 999;
  flood(5);
  expect(lines).toHaveLength(3);
  nowMs = 1000;
  flood(1);
  expect(lines.at(-1)).toEqual({ omittedCount: 102 });
  flood(1);
  expect(lines.at(-1)).toEqual({});
});

test('durations are whole numbers with a unit', () => {
  expect(['90s', '15m', '12h', '30d', ' 1 d '].map(parseDuration)).toEqual([90e3, 900e3, 43_200e3, 2_592_000e3, 864e5]);
  for (const text of ['', '30', 'd', '-1d', '1.5h', '1w', '1d2h']) expect(parseDuration(text), text).toBeNaN();
});

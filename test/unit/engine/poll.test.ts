import { expect, test } from 'vitest';
import { PollPace } from '../../../src/engine/poll.js';

const LIMITS = { pollMsFirst: 5, pollMs: 100 };

test('polls ever more rarely while nothing is known of the end', () => {
  const pace = new PollPace(LIMITS);
  expect(Array.from({ length: 7 }, () => pace.nextMs(null))).toEqual([5, 10, 20, 40, 80, 100, 100]);
});

test('looks again after half of the time that is left, but neither at once nor too late', () => {
  const pace = new PollPace(LIMITS);
  for (let round = 0; round < 6; round++) pace.nextMs(60);
  expect([60, 0.1, 0.04, 0.001, 0].map((secondsLeft) => pace.nextMs(secondsLeft))).toEqual([100, 50, 20, 5, 5]);
});

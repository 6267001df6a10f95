/** What a host that has joined a fork does while nobody tells it whether the fork is committed. */
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { UndecidedForks } from '../../../../src/agent/fork/decision/undecided.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import type { ForkDecision } from '../../../../src/engine/ports/fork.js';

const FORK = '5'.repeat(16);
const MINUTE_MS = 60_000;

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

function watching(answer: () => Promise<ForkDecision>) {
  const seen = { asked: 0, discarded: 0, warnings: [] as string[], isPeer: true, isUndecided: true };
  const act = { discard: async () => void seen.discarded++ };
  const log = { info: () => undefined, warn: (_: object, text: string) => void seen.warnings.push(text) };
  const forks = new UndecidedForks({
    log: { ...log, error: log.warn },
    ask: async (host, fork) => {
      expect([host, fork]).toEqual(['A', FORK]);
      seen.asked++;
      return { decision: await answer() };
    },
    isPeer: () => seen.isPeer,
    isUndecided: () => seen.isUndecided,
    discard: () => act.discard(),
  });
  forks.watch(FORK, 'A');
  return { forks, seen, act };
}

test('a fork that was not committed is discarded, once', async () => {
  const { seen } = watching(async () => 'discarded');
  await vi.advanceTimersByTimeAsync(29_000);
  expect(seen.asked).toBe(0);
  await vi.advanceTimersByTimeAsync(2_000);
  expect(seen).toMatchObject({ asked: 1, discarded: 1 });
  await vi.advanceTimersByTimeAsync(10 * MINUTE_MS);
  expect(seen).toMatchObject({ asked: 1, discarded: 1 });
});

test('a fork that is committed waits for its coordinator, and is only logged', async () => {
  const { seen, forks } = watching(async () => 'committed');
  await vi.advanceTimersByTimeAsync(10 * MINUTE_MS);
  forks.heard(FORK);
  await vi.advanceTimersByTimeAsync(10 * MINUTE_MS);
  expect(seen.discarded).toBe(0);
  expect(seen.asked).toBeGreaterThan(5);
  expect(seen.warnings).toHaveLength(1);
});

test.each([
  ['no answer', async () => Promise.reject(new MigrationError('UNREACHABLE', 'down'))],
  ['an open fork', async (): Promise<ForkDecision> => 'open'],
])('after %s it asks for ever, less and less often', async (_, answer) => {
  const { seen } = watching(answer);
  await vi.advanceTimersByTimeAsync(MINUTE_MS * 60);
  expect(seen.asked).toBeGreaterThan(25);
  expect(seen.asked).toBeLessThan(40);
  expect(seen.discarded).toBe(0);
});

test('a fork whose root is no peer any more is discarded without a question, also if that fails at first', async () => {
  const { seen, act } = watching(async () => Promise.reject(new MigrationError('NOT_FOUND', 'no such host')));
  await vi.advanceTimersByTimeAsync(10 * MINUTE_MS);
  expect(seen.discarded).toBe(0);
  const askedBefore = seen.asked;
  seen.isPeer = false;
  const { discard } = act;
  act.discard = async () => Promise.reject(new Error('the disk is full'));
  await vi.advanceTimersByTimeAsync(3 * MINUTE_MS);
  act.discard = discard;
  await vi.advanceTimersByTimeAsync(10 * MINUTE_MS);
  expect(seen).toMatchObject({ asked: askedBefore, discarded: 1 });
});

test('a call of the fork postpones the question', async () => {
  const { seen, forks } = watching(async () => 'discarded');
  for (let call = 0; call < 10; call++) {
    await vi.advanceTimersByTimeAsync(25_000);
    forks.heard(FORK);
  }
  expect(seen.asked).toBe(0);
});

test('a fork that is committed while the answer is on its way is left alone', async () => {
  let answer: (decision: ForkDecision) => void = () => undefined;
  const { seen } = watching(() => new Promise((resolve) => (answer = resolve)));
  await vi.advanceTimersByTimeAsync(31_000);
  seen.isUndecided = false;
  answer('discarded');
  await vi.advanceTimersByTimeAsync(10 * MINUTE_MS);
  expect(seen).toMatchObject({ asked: 1, discarded: 0 });
});

test('a fork that is forgotten while the answer is on its way is left alone', async () => {
  let answer: (decision: ForkDecision) => void = () => undefined;
  const { seen, forks } = watching(() => new Promise((resolve) => (answer = resolve)));
  await vi.advanceTimersByTimeAsync(31_000);
  forks.forget(FORK);
  answer('discarded');
  await vi.advanceTimersByTimeAsync(10 * MINUTE_MS);
  expect(seen).toMatchObject({ asked: 1, discarded: 0 });
});

test('an undo that fails is tried again', async () => {
  const { seen, act } = watching(async () => 'discarded');
  const discard = act.discard;
  act.discard = () => Promise.reject(new MigrationError('STEP_FAILED', 'QEMU does not end'));
  await vi.advanceTimersByTimeAsync(31_000);
  expect(seen.discarded).toBe(0);
  act.discard = discard;
  await vi.advanceTimersByTimeAsync(3 * MINUTE_MS);
  expect(seen.discarded).toBe(1);
});

test('nothing is asked any more when the daemon ends', async () => {
  const { seen, forks } = watching(async () => 'open');
  forks.close();
  await vi.advanceTimersByTimeAsync(10 * MINUTE_MS);
  expect(seen.asked).toBe(0);
});

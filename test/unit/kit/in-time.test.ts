import { expect, test } from 'vitest';
import { inTime } from '../../../src/kit/in-time.js';

const NEVER = new Promise<never>(() => undefined);

test('an answer, or an error, is passed on, and nothing waits any longer', async () => {
  const signals: AbortSignal[] = [];
  const sleep = (_: number, signal: AbortSignal): Promise<void> => {
    signals.push(signal);
    return NEVER;
  };
  expect(await inTime('B', 5_000, Promise.resolve(7), { sleep })).toBe(7);
  await expect(inTime('B', 5_000, Promise.reject(new Error('no')), { sleep })).rejects.toThrow('no');
  expect(signals.map(({ aborted }) => aborted)).toEqual([true, true]);
});

test('a host that does not answer is not waited for', async () => {
  const asked: number[] = [];
  const sleep = async (ms: number): Promise<void> => void asked.push(ms);
  await expect(inTime('B', 5_000, NEVER, { sleep })).rejects.toMatchObject({
    ...{ code: 'TIMEOUT', message: 'B did not answer within 5 s' },
  });
  expect(asked).toEqual([5_000]);
  await expect(inTime('B', 1, NEVER)).rejects.toMatchObject({ code: 'TIMEOUT' });
});

test('an answer that comes with the end of the wait counts', async () => {
  expect(await inTime('B', 0, Promise.resolve('there'), { sleep: async () => undefined })).toBe('there');
});

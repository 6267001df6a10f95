/** Waits for another host, but not for ever. */
import { setTimeout as sleepFor } from 'node:timers/promises';
import { MigrationError } from '../domain/errors.js';

/** Resolves after `ms`, or as soon as the signal aborts. */
export type Sleep = (ms: number, signal: AbortSignal) => Promise<void>;

/** Throws TIMEOUT if the host has not answered after `msMax`. What it answers later is ignored. */
export async function inTime<T>(host: string, msMax: number, answer: Promise<T>, sleep: Sleep = pass): Promise<T> {
  const over = new AbortController();
  const tooLate = sleep(msMax, over.signal).then((): never => {
    throw new MigrationError('TIMEOUT', `${host} did not answer within ${msMax / 1000} s`);
  });
  // Nobody waits for it any more once the host has answered.
  tooLate.catch(() => undefined);
  try {
    return await Promise.race([answer, tooLate]);
  } finally {
    over.abort();
  }
}

/** A process that ends does not wait for it. */
async function pass(ms: number, signal: AbortSignal): Promise<void> {
  await sleepFor(ms, undefined, { ref: false, signal }).catch(() => undefined);
}

/** Waits for another host, but not for ever. */
import { setTimeout as sleepFor } from 'node:timers/promises';
import { MigrationError } from '../domain/errors.js';

export interface Sleeper {
  /** Resolves after `ms`, or as soon as the signal aborts. */
  sleep(ms: number, signal: AbortSignal): Promise<void>;
}

/** A process that ends does not wait for it. */
const SLEEPER: Sleeper = {
  async sleep(ms, signal) {
    await sleepFor(ms, undefined, { ref: false, signal }).catch(() => undefined);
  },
};

/** Throws TIMEOUT if the host has not answered after `msMax`. What it answers later is ignored. */
export async function inTime<T>(host: string, msMax: number, answer: Promise<T>, clock: Sleeper = SLEEPER): Promise<T> {
  const over = new AbortController();
  const tooLate = clock.sleep(msMax, over.signal).then((): never => {
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

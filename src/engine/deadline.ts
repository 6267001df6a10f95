import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { Clock } from './ports/clock.js';

const OVER = Symbol('the work is over');

/**
 * `work`, or TIMEOUT after `msMax`, or CANCELLED as soon as `signal` aborts. The work itself goes on: whoever gives up
 * on it must undo as if it had taken effect, and late effects are refused by the agents (see the rules in
 * ports/host.ts).
 */
export function withDeadline<T>(
  clock: Clock,
  work: Promise<T>,
  msMax: number,
  what: string,
  signal?: AbortSignal,
): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const timer = new AbortController();
    const leave = (): void => {
      // With a reason, because making the default one (an exception with its stack) is the dearest part of a call in
      // the blackout.
      timer.abort(OVER);
      signal?.removeEventListener('abort', onAbort);
    };
    const onAbort = (): void => {
      leave();
      reject(toMigrationError(signal?.reason, 'CANCELLED'));
    };
    work.then(
      (value) => {
        leave();
        resolve(value);
      },
      (error: unknown) => {
        leave();
        reject(toMigrationError(error));
      },
    );
    if (msMax > 0) {
      const expire = (): void => {
        if (timer.signal.aborted) return;
        leave();
        reject(new MigrationError('TIMEOUT', `${what} did not finish within ${msMax} ms`));
      };
      clock.sleep(msMax, timer.signal).then(expire, expire);
    }
    if (signal?.aborted) onAbort();
    else signal?.addEventListener('abort', onAbort);
  });
}

/** Sleeps, or throws the signal's reason as soon as it aborts. */
export async function pause(clock: Clock, ms: number, signal: AbortSignal): Promise<void> {
  await clock.sleep(ms, signal).catch(() => undefined);
  if (signal.aborted) throw toMigrationError(signal.reason, 'CANCELLED');
}

/** May the same call succeed later, unchanged? */
export function mayPass(error: MigrationError): boolean {
  return error.isRetryable || error.code === 'UNREACHABLE' || error.code === 'TIMEOUT' || error.code === 'DISCONNECTED';
}

/** After the commit there is nothing better to do than to wait until somebody has made room. */
export function mayPassAfterCommit(error: MigrationError): boolean {
  return mayPass(error) || error.code === 'NO_SPACE' || error.code === 'OUT_OF_MEMORY';
}

import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { Clock } from './ports/clock.js';

const OVER = Symbol('the work is over');

/**
 * Returns the result of `work`, or throws TIMEOUT after `msMax`, or CANCELLED as soon as `signal` aborts. The work
 * itself continues, so the caller must undo it as if it had taken effect. The agents refuse late effects (see the rules
 * in ports/host.ts).
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
      // The reason is given because creating the default one (an exception with its stack) is the most expensive part
      // of a call in the blackout.
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

/** Sleeps for `ms`. Throws the signal's reason as soon as the signal aborts. */
export async function pause(clock: Clock, ms: number, signal: AbortSignal): Promise<void> {
  await clock.sleep(ms, signal).catch(() => undefined);
  if (signal.aborted) throw toMigrationError(signal.reason, 'CANCELLED');
}

/** True if the same call may succeed later, unchanged. */
export function isTransient(error: MigrationError): boolean {
  return error.isRetryable || error.code === 'UNREACHABLE' || error.code === 'TIMEOUT' || error.code === 'DISCONNECTED';
}

/** After the commit a lack of space counts as transient too: the engine waits until somebody has made room. */
export function isTransientAfterCommit(error: MigrationError): boolean {
  return isTransient(error) || error.code === 'NO_SPACE' || error.code === 'OUT_OF_MEMORY';
}

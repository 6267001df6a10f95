/** Calls of the addon. Their failures become MigrationErrors that name the attempted action. */
import { thrownToError } from './failure.js';

/** Runs a native call. The message of its errors begins with `doing`. */
export function attempt<T>(doing: string, call: () => T): T {
  try {
    return call();
  } catch (thrown) {
    throw thrownToError(thrown, doing);
  }
}

export async function attemptAsync<T>(doing: string, call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (thrown) {
    throw thrownToError(thrown, doing);
  }
}

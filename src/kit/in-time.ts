/** Waits for another host, but not for ever. */
import { MigrationError } from '../domain/errors.js';

/** Throws TIMEOUT if the host has not answered after `msMax`. What it answers later is ignored. */
export async function inTime<T>(host: string, msMax: number, answer: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const tooLate = new Promise<never>((_, reject) => {
    const late = (): void => reject(new MigrationError('TIMEOUT', `${host} did not answer within ${msMax / 1000} s`));
    // A process that ends does not wait for it.
    timer = setTimeout(late, msMax).unref();
  });
  try {
    return await Promise.race([answer, tooLate]);
  } finally {
    clearTimeout(timer);
  }
}

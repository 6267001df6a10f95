/**
 * Turns native failures into MigrationErrors. The native code chooses a NATIVE_ERROR where the error occurs. This file
 * maps it to an error code of the project.
 */
import { getSystemErrorName } from 'node:util';
import { type ErrorCode, MigrationError } from '../domain/errors.js';
import { LIMITS, limitMet } from '../domain/limits.js';
import { NATIVE_ERROR } from '../protocol/wire.js';
import type { NativeFailure } from './types.js';

const CODES: Readonly<Record<keyof typeof NATIVE_ERROR, ErrorCode>> = {
  INVALID_ARGUMENT: 'USAGE',
  SYSTEM: 'NATIVE_FAILED',
  NOT_PERMITTED: 'NOT_PERMITTED',
  NO_SPACE: 'NO_SPACE',
  OUT_OF_MEMORY: 'OUT_OF_MEMORY',
  NOT_FOUND: 'NOT_FOUND',
  ALREADY_EXISTS: 'CONFLICT',
  UNSUPPORTED: 'UNSUPPORTED',
  DISCONNECTED: 'DISCONNECTED',
  REFUSED: 'UNAUTHENTICATED',
  TIMEOUT: 'TIMEOUT',
  PROTOCOL: 'PEER_PROTOCOL',
  REGION_CHANGED: 'REGION_CHANGED',
  PROCESS_GONE: 'QEMU_GONE',
  CLOSED: 'CONFLICT',
  CORRUPT: 'CORRUPT',
  PATH_STALLED: 'TIMEOUT',
  DAMAGED: 'DAMAGED',
};
const BY_NUMBER = new Map<number, ErrorCode>(
  (Object.keys(CODES) as (keyof typeof NATIVE_ERROR)[]).map((name) => [NATIVE_ERROR[name], CODES[name]]),
);
/** Remedies. A reader sees the name of the host in the lines above. */
const REMEDIES: Partial<Readonly<Record<ErrorCode, string>>> = {
  NO_SPACE: 'free space in the directory of the memory files on that host',
  OUT_OF_MEMORY: LIMITS.memory.remedy,
  NOT_PERMITTED: 'run "vmctl doctor" on that host and follow its remedies',
};
/** The remedy of a failure that its error code does not tell enough of. */
const REMEDIES_BY_NUMBER: ReadonlyMap<number, string> = new Map([
  [
    NATIVE_ERROR.PATH_STALLED,
    'the network between the data addresses (--data) of the hosts loses full-size packets: give both ends and every ' +
      'switch between them the same MTU, and try "ping -M do -s SIZE" with the size of the MTU less 28',
  ],
]);
const RETRYABLE: readonly ErrorCode[] = ['DISCONNECTED', 'TIMEOUT'];

function errnoName(errno: number): string {
  try {
    return getSystemErrorName(-errno);
  } catch {
    return `errno ${errno}`;
  }
}

/** `doing` names the attempted call in the caller's words. `failure.what` names the operation in it that failed. */
export function failureToError(failure: NativeFailure, doing: string, cause?: unknown): MigrationError {
  const known = BY_NUMBER.get(failure.code) ?? 'NATIVE_FAILED';
  // If the kernel refused the argument, the caller made no mistake.
  const code = failure.code === NATIVE_ERROR.INVALID_ARGUMENT && failure.errno !== 0 ? 'NATIVE_FAILED' : known;
  const name = failure.errno === 0 ? '' : errnoName(failure.errno);
  const details = { nativeCode: failure.code, errno: failure.errno };
  const given = cause === undefined ? {} : { cause };
  const limit = limitMet(name, failure.what);
  // The native code knows better what other errors mean: no huge page is left, a file system is full.
  if (limit !== null && (code === 'NATIVE_FAILED' || code === 'OUT_OF_MEMORY')) {
    const { code: limitCode, text, remedy } = LIMITS[limit];
    const message = `${doing}: ${failure.what} (${name})${limit === 'memory' ? '' : `: ${text}`}`;
    return new MigrationError(limitCode, message, { remedy, details: { ...details, limit }, ...given });
  }
  const remedy = REMEDIES_BY_NUMBER.get(failure.code) ?? REMEDIES[code];
  return new MigrationError(code, `${doing}: ${failure.what}${name === '' ? '' : ` (${name})`}`, {
    ...(remedy === undefined ? {} : { remedy }),
    isRetryable: RETRYABLE.includes(code),
    details,
    ...given,
  });
}

/** Turns whatever a native call has thrown into a MigrationError. An error without a native code is a bug. */
export function thrownToError(thrown: unknown, doing: string): MigrationError {
  if (thrown instanceof MigrationError) return thrown;
  const { nativeCode, errno, message } = thrown as { nativeCode?: unknown; errno?: unknown; message?: unknown };
  if (typeof nativeCode !== 'number' || typeof errno !== 'number') {
    return new MigrationError('INTERNAL', `${doing}: ${String(message ?? thrown)}`, { cause: thrown });
  }
  return failureToError({ code: nativeCode, errno, what: String(message) }, doing);
}

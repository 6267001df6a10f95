/**
 * Native failures as MigrationErrors. The native side decides the code (NATIVE_ERROR) where it first knows the error;
 * here it only gets the project's name.
 */
import { getSystemErrorName } from 'node:util';
import { type ErrorCode, MigrationError } from '../domain/errors.js';
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
};
const BY_NUMBER = new Map<number, ErrorCode>(
  (Object.keys(CODES) as (keyof typeof NATIVE_ERROR)[]).map((name) => [NATIVE_ERROR[name], CODES[name]]),
);
/** For a person who has read above them which host it was. */
const REMEDIES: Partial<Readonly<Record<ErrorCode, string>>> = {
  NO_SPACE: 'free space where the memory files of that host are',
  OUT_OF_MEMORY: 'free memory on that host, or raise the limits of vmigrated: "vmctl doctor" there shows them',
  NOT_PERMITTED: 'look at what "vmctl doctor" says on that host',
};
const RETRYABLE: readonly ErrorCode[] = ['DISCONNECTED', 'TIMEOUT'];

function errnoName(errno: number): string {
  try {
    return getSystemErrorName(-errno);
  } catch {
    return `errno ${errno}`;
  }
}

/** `doing` says what was attempted, in a caller's words; `failure.what` names the operation that failed in it. */
export function failureToError(failure: NativeFailure, doing: string, cause?: unknown): MigrationError {
  const known = BY_NUMBER.get(failure.code) ?? 'NATIVE_FAILED';
  // An argument that only the kernel refused was no mistake of the caller's.
  const code = failure.code === NATIVE_ERROR.INVALID_ARGUMENT && failure.errno !== 0 ? 'NATIVE_FAILED' : known;
  const remedy = REMEDIES[code];
  const system = failure.errno === 0 ? '' : ` (${errnoName(failure.errno)})`;
  return new MigrationError(code, `${doing}: ${failure.what}${system}`, {
    ...(remedy === undefined ? {} : { remedy }),
    isRetryable: RETRYABLE.includes(code),
    details: { nativeCode: failure.code, errno: failure.errno },
    ...(cause === undefined ? {} : { cause }),
  });
}

/** What a native call has thrown. Anything that it did not throw on purpose is a bug of ours. */
export function thrownToError(thrown: unknown, doing: string): MigrationError {
  if (thrown instanceof MigrationError) return thrown;
  const { nativeCode, errno, message } = thrown as { nativeCode?: unknown; errno?: unknown; message?: unknown };
  if (typeof nativeCode !== 'number' || typeof errno !== 'number') {
    return new MigrationError('INTERNAL', `${doing}: ${String(message ?? thrown)}`, { cause: thrown });
  }
  return failureToError({ code: nativeCode, errno, what: String(message) }, doing);
}

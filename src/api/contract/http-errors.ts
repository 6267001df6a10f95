/**
 * The errors of the API over HTTP. Every failure has an ErrorJson body. This file maps each code to an HTTP status, and
 * the errors of libraries to codes.
 */
import type { z } from 'zod';
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import { parseKeepingUnknown } from '../../kit/unknown-keys.js';

const STATUS: { readonly [C in ErrorCode]: number } = {
  USAGE: 400,
  SPEC_INVALID: 422,
  NOT_FOUND: 404,
  CONFLICT: 409,
  VM_BUSY: 409,
  PREFLIGHT_REFUSED: 422,
  CANCELLED: 409,
  UNSUPPORTED: 501,
  UNREACHABLE: 502,
  UNAUTHENTICATED: 401,
  PEER_PROTOCOL: 502,
  TIMEOUT: 504,
  NO_SPACE: 507,
  OUT_OF_MEMORY: 507,
  NOT_PERMITTED: 403,
  IO_FAILED: 500,
  REGION_CHANGED: 500,
  CORRUPT: 500,
  DAMAGED: 500,
  DISK_CHANGED: 409,
  QEMU_FAILED: 500,
  QEMU_GONE: 500,
  NATIVE_FAILED: 500,
  DISCONNECTED: 502,
  STEP_FAILED: 500,
  DOWNTIME_TOO_LONG: 500,
  OWNER_CHANGED: 409,
  NEEDS_RECOVERY: 409,
  VM_LOST: 500,
  INTERNAL: 500,
};

export function httpStatus(code: ErrorCode): number {
  return STATUS[code];
}

/** Returns the path and message of each issue, and the path of each unknown key. */
export function describeIssues(error: z.ZodError, where: string): string {
  const place = (path: readonly PropertyKey[]) => [where, ...path.map(String)].join('.');
  return error.issues
    .flatMap((issue) =>
      issue.code === 'unrecognized_keys'
        ? issue.keys.map((key) => `${place([...issue.path, key])}: unknown key`)
        : [`${place(issue.path)}: ${issue.message}`],
    )
    .join('; ');
}

/** Returns the checked input. Throws an error that names every wrong key. */
export function check<T>(schema: z.ZodType<T>, input: unknown, where: string, code: ErrorCode = 'USAGE'): T {
  const result = schema.safeParse(input);
  if (result.success) return result.data;
  throw new MigrationError(code, describeIssues(result.error, where));
}

/** Like `check`, for calls of other hosts: keys of a newer version are kept. */
export function checkKept<T>(schema: z.ZodType<T>, input: unknown, where: string): T {
  const result = parseKeepingUnknown(schema, input);
  if (result.success) return result.data;
  throw new MigrationError('USAGE', describeIssues(result.error, where));
}

/**
 * Fastify's own refusals (body too large, not JSON, wrong media type) have a status below 500, since the request is
 * wrong.
 */
export function apiError(thrown: unknown): { error: MigrationError; status: number } {
  if (!(thrown instanceof MigrationError)) {
    const status = (thrown as { statusCode?: unknown }).statusCode;
    if (typeof status === 'number' && status >= 400 && status < 500) {
      const message = thrown instanceof Error ? thrown.message : String(thrown);
      return { error: new MigrationError('USAGE', message, { cause: thrown }), status };
    }
  }
  const error = toMigrationError(thrown);
  return { error, status: httpStatus(error.code) };
}

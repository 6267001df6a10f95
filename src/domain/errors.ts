/**
 * The project's errors. Tests and callers match `code`, never text. The code that first detects an error chooses its
 * code and logs it. Outer layers wrap it as `cause`. The chain of causes is kept in JSON: between hosts, in files and
 * over the API.
 */
import { LIMITS, limitOfError } from './limits.js';

export const ERROR_CODES = {
  // request
  USAGE: 'the request is malformed',
  SPEC_INVALID: 'a VM spec, configuration or document has an unknown key or an impossible value',
  NOT_FOUND: 'no such VM, job, host or session',
  CONFLICT: 'the name is taken, or the object is in a state that forbids the call',
  VM_BUSY: 'the VM is already part of a job',
  PREFLIGHT_REFUSED: 'pre-flight found a reason not to start',
  CANCELLED: 'cancelled on request',
  UNSUPPORTED: 'this build or this host cannot do it',
  // hosts and peers
  UNREACHABLE: 'the daemon or peer does not answer',
  UNAUTHENTICATED: 'the peer presents no valid certificate or token',
  PEER_PROTOCOL: "the peer's answer violates the protocol",
  TIMEOUT: 'a deadline passed',
  // resources
  NO_SPACE: 'a file system is full',
  OUT_OF_MEMORY: 'not enough memory, or another limit of the host is reached (details.limit)',
  NOT_PERMITTED: 'the kernel or the daemon does not permit this',
  IO_FAILED: 'the system cannot read or write a file, for example because of a damaged disk',
  REGION_CHANGED: 'a region file has been replaced or resized',
  CORRUPT: 'a file does not hold what vmigrate wrote to it',
  DAMAGED: 'memory is not what it was on the host that it came from',
  DISK_CHANGED: 'a disk is not as it was at the moment of the memory that is to run on it',
  // QEMU and native
  QEMU_FAILED: 'QEMU refused or failed a command',
  QEMU_GONE: 'the QEMU process has ended',
  NATIVE_FAILED: 'the native engine failed',
  DISCONNECTED: 'a data connection is lost',
  // migration
  STEP_FAILED: 'a step of the job failed; the cause says how',
  DOWNTIME_TOO_LONG: 'the VM writes too fast for the downtime that it is allowed',
  OWNER_CHANGED: 'the VM belongs to another host or a newer epoch',
  NEEDS_RECOVERY: 'execution has moved, pages are missing and the peers cannot reach each other',
  VM_LOST: 'the VM cannot run on any host any more',
  INTERNAL: 'a bug in vmigrate',
} as const;

export type ErrorCode = keyof typeof ERROR_CODES;

/** The codes of errors in which two hosts, or a client and a daemon, cannot reach each other. */
export const NETWORK_CODES: ReadonlySet<ErrorCode> = new Set(['UNREACHABLE', 'TIMEOUT', 'DISCONNECTED']);

/** How many levels of causes the JSON of an error holds; deeper ones are dropped. */
export const CAUSES_MAX = 4;
/** The longest message, remedy or name in JSON; longer ones are cut. */
export const ERROR_TEXT_CHARS_MAX = 4096;
/** The longest details of a cause, as JSON; longer ones are dropped. */
export const CAUSE_DETAILS_CHARS_MAX = 4096;

export interface ErrorContext {
  /** What a person can do about the error. */
  readonly remedy?: string;
  /** The job's step in which the error happened. */
  readonly step?: string;
  readonly session?: string;
  /** The same call may succeed if it is repeated. */
  readonly isRetryable?: boolean;
  readonly details?: unknown;
  readonly cause?: unknown;
}

export interface CauseJson {
  /**
   * Absent for an error that is not a MigrationError. Then `name` is its class, and `details` holds code, errno and
   * syscall of a system error.
   */
  readonly code?: ErrorCode;
  readonly name?: string;
  readonly message: string;
  readonly remedy?: string;
  readonly step?: string;
  readonly session?: string;
  readonly isRetryable?: boolean;
  readonly details?: unknown;
  readonly cause?: CauseJson;
}

export interface ErrorJson extends CauseJson {
  readonly code: ErrorCode;
}

export class MigrationError extends Error {
  readonly code: ErrorCode;
  readonly remedy: string | undefined;
  readonly step: string | undefined;
  readonly session: string | undefined;
  readonly isRetryable: boolean;
  readonly details: unknown;

  constructor(code: ErrorCode, message: string, context: ErrorContext = {}) {
    super(message, context.cause === undefined ? undefined : { cause: context.cause });
    this.name = 'MigrationError';
    this.code = code;
    this.remedy = context.remedy;
    this.step = context.step;
    this.session = context.session;
    this.isRetryable = context.isRetryable ?? false;
    this.details = context.details;
  }

  toJSON(): ErrorJson {
    return { ...ownJson(this), ...present('details', this.details), ...causeJson(this.cause, CAUSES_MAX) };
  }

  /** Decodes a peer's JSON. An unknown code becomes PEER_PROTOCOL, never a new code. */
  static fromJSON(json: unknown, where: string): MigrationError {
    const record = recordOf(json);
    if (isMigrationErrorJson(record)) return migrationErrorFrom(record, record.details, CAUSES_MAX);
    const original = causeFrom(json, CAUSES_MAX);
    return new MigrationError('PEER_PROTOCOL', `the error from ${where} does not have a known code`, {
      cause: original,
    });
  }

  /** Converts a value that was thrown here, or the JSON of an error from `where`. */
  static from(error: unknown, where: string): MigrationError {
    return error instanceof Error ? toMigrationError(error) : MigrationError.fromJSON(error, where);
  }
}

/**
 * Converts any thrown value to a MigrationError. An error of the system that names a limit gets the code and the remedy
 * of that limit, unless the caller knows it already. Other errors get the code `fallback`. The thrown error becomes the
 * cause.
 */
export function toMigrationError(thrown: unknown, fallback: ErrorCode = 'INTERNAL'): MigrationError {
  if (thrown instanceof MigrationError) return thrown;
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  const limit = limitOfError(thrown);
  if (limit !== null && LIMITS[limit].code !== fallback) {
    const { code, text, remedy } = LIMITS[limit];
    return new MigrationError(code, `${text}: ${message}`, { remedy, details: { limit }, cause: thrown });
  }
  return new MigrationError(fallback, message, { cause: thrown });
}

// ---- into JSON

function ownJson({ code, message, remedy, step, session, isRetryable }: MigrationError) {
  return {
    code,
    message: cut(message),
    ...(remedy === undefined ? {} : { remedy: cut(remedy) }),
    ...(step === undefined ? {} : { step: cut(step) }),
    ...(session === undefined ? {} : { session: cut(session) }),
    ...(isRetryable ? { isRetryable: true } : {}),
  };
}

function causeJson(cause: unknown, levels: number): { cause?: CauseJson } {
  if (levels === 0 || !(cause instanceof Error)) return {};
  const isOwn = cause instanceof MigrationError;
  const own = isOwn ? ownJson(cause) : { name: cut(cause.name), message: cut(cause.message) };
  const details = boundedDetails(isOwn ? cause.details : systemFacts(cause));
  return { cause: { ...own, ...present('details', details), ...causeJson(cause.cause, levels - 1) } };
}

function present<Name extends string>(name: Name, value: unknown): { [N in Name]?: unknown } {
  return value === undefined ? {} : ({ [name]: value } as { [N in Name]?: unknown });
}

function cut(text: string): string {
  return text.length <= ERROR_TEXT_CHARS_MAX ? text : `${text.slice(0, ERROR_TEXT_CHARS_MAX - 1)}…`;
}

/** Returns the details, or undefined if they are too long or cannot be written as JSON. */
function boundedDetails(details: unknown): unknown {
  try {
    const text = JSON.stringify(details) as string | undefined;
    return text !== undefined && text.length <= CAUSE_DETAILS_CHARS_MAX ? details : undefined;
  } catch {
    return undefined;
  }
}

/** Returns the facts that Node attaches to the error of a failed system call. */
function systemFacts(error: object): object | undefined {
  const { code, errno, syscall } = error as { code?: unknown; errno?: unknown; syscall?: unknown };
  const facts = {
    ...(typeof code === 'string' ? { code: cut(code) } : {}),
    ...(typeof errno === 'number' ? { errno } : {}),
    ...(typeof syscall === 'string' ? { syscall: cut(syscall) } : {}),
  };
  return Object.keys(facts).length === 0 ? undefined : facts;
}

// ---- from JSON, which may come from a newer, an older or a hostile peer

type JsonRecord = Readonly<Record<string, unknown>>;

function recordOf(json: unknown): JsonRecord {
  return typeof json === 'object' && json !== null ? (json as JsonRecord) : {};
}

function isMigrationErrorJson(record: JsonRecord): record is JsonRecord & { code: ErrorCode; message: string } {
  const { code, message } = record;
  return typeof code === 'string' && Object.hasOwn(ERROR_CODES, code) && typeof message === 'string';
}

function migrationErrorFrom(
  record: JsonRecord & { code: ErrorCode; message: string },
  details: unknown,
  levels: number,
) {
  const { code, message, remedy, step, session, isRetryable } = record;
  return new MigrationError(code, cut(message), {
    ...(typeof remedy === 'string' ? { remedy: cut(remedy) } : {}),
    ...(typeof step === 'string' ? { step: cut(step) } : {}),
    ...(typeof session === 'string' ? { session: cut(session) } : {}),
    isRetryable: isRetryable === true,
    details,
    cause: causeFrom(record.cause, levels),
  });
}

/** Decodes a cause. JSON that is not an error is dropped; an unknown code is kept as the error's name. */
function causeFrom(json: unknown, levels: number): Error | undefined {
  const record = recordOf(json);
  const { code, name, message, details } = record;
  if (levels === 0 || typeof message !== 'string') return undefined;
  if (isMigrationErrorJson(record)) return migrationErrorFrom(record, boundedDetails(details), levels - 1);
  const cause = causeFrom(record.cause, levels - 1);
  const error = new Error(cut(message), cause === undefined ? undefined : { cause });
  const named = [name, code].find((word) => typeof word === 'string');
  error.name = cut(named ?? 'Error');
  return Object.assign(error, systemFacts(recordOf(details)));
}

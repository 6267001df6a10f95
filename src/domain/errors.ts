/**
 * The project's errors. Tests and callers match `code`, never text. Whoever first knows an error decides its code and
 * logs it; outer layers add context by `cause`, and the chain of causes goes with the error to other hosts, into files
 * and over the API.
 */
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
  UNAUTHENTICATED: 'the peer shows no acceptable certificate or token',
  PEER_PROTOCOL: 'the peer answered something that the protocol does not allow',
  TIMEOUT: 'a deadline passed',
  // resources
  NO_SPACE: 'a file system is full',
  OUT_OF_MEMORY: 'not enough memory',
  NOT_PERMITTED: 'the kernel refuses this to the daemon',
  REGION_CHANGED: 'a region file is not what it was',
  CORRUPT: 'a file of ours does not hold what we wrote',
  // QEMU and native
  QEMU_FAILED: 'QEMU refused or failed a command',
  QEMU_GONE: 'the QEMU process has ended',
  NATIVE_FAILED: 'the native engine failed',
  DISCONNECTED: 'a data connection is lost',
  // migration
  STEP_FAILED: 'a step of the job failed; the cause says how',
  OWNER_CHANGED: 'the VM belongs to another host or a newer epoch',
  NEEDS_RECOVERY: 'execution has moved, pages are missing and the peers cannot reach each other',
  VM_LOST: 'the VM can run nowhere any more',
  INTERNAL: 'a bug of ours',
} as const;

export type ErrorCode = keyof typeof ERROR_CODES;

/** Those that say that two hosts, or a client and a daemon, do not hear each other. */
export const NETWORK_CODES: ReadonlySet<ErrorCode> = new Set(['UNREACHABLE', 'TIMEOUT', 'DISCONNECTED']);

/** Causes below an error, as JSON carries them; what lies deeper is cut. */
export const CAUSES_MAX = 4;
/** Of a message, a remedy or a name in JSON; a longer one is cut. */
export const ERROR_TEXT_CHARS_MAX = 4096;
/** As JSON. A cause's details are a few facts; longer ones are left out. */
export const CAUSE_DETAILS_CHARS_MAX = 4096;

export interface ErrorContext {
  /** What to do about it, for a person. */
  readonly remedy?: string;
  /** Step of a job in which it happened. */
  readonly step?: string;
  readonly session?: string;
  /** Worth trying again unchanged. */
  readonly isRetryable?: boolean;
  readonly details?: unknown;
  readonly cause?: unknown;
}

export interface CauseJson {
  /** Missing: not one of ours, and `name` is its class; `details` holds code, errno and syscall of a system's error. */
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

  /** From a peer's JSON: anything that is not one of our codes is a protocol error, not a new code. */
  static fromJSON(json: unknown, where: string): MigrationError {
    const record = recordOf(json);
    if (isOurs(record)) return ours(record, record.details, CAUSES_MAX);
    const said = causeFrom(json, CAUSES_MAX);
    return new MigrationError('PEER_PROTOCOL', `${where} answered with an error that is not one of ours`, {
      cause: said,
    });
  }

  /** What was thrown here, or what came from `where` as JSON. */
  static from(error: unknown, where: string): MigrationError {
    return error instanceof Error ? toMigrationError(error) : MigrationError.fromJSON(error, where);
  }
}

/** Any thrown value as a MigrationError; what is not ours becomes INTERNAL with the original as cause. */
export function toMigrationError(thrown: unknown, fallback: ErrorCode = 'INTERNAL'): MigrationError {
  if (thrown instanceof MigrationError) return thrown;
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  return new MigrationError(fallback, message, { cause: thrown });
}

// ---- into JSON
// ---------------------------------------------------------------------------------------------------------------------

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
  const details = fewDetails(isOwn ? cause.details : systemFacts(cause));
  return { cause: { ...own, ...present('details', details), ...causeJson(cause.cause, levels - 1) } };
}

function present<Name extends string>(name: Name, value: unknown): { [N in Name]?: unknown } {
  return value === undefined ? {} : ({ [name]: value } as { [N in Name]?: unknown });
}

function cut(text: string): string {
  return text.length <= ERROR_TEXT_CHARS_MAX ? text : `${text.slice(0, ERROR_TEXT_CHARS_MAX - 1)}…`;
}

/** undefined for what is too long, or no JSON. */
function fewDetails(details: unknown): unknown {
  try {
    const text = JSON.stringify(details) as string | undefined;
    return text !== undefined && text.length <= CAUSE_DETAILS_CHARS_MAX ? details : undefined;
  } catch {
    return undefined;
  }
}

/** What Node says of a failed system call. */
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
// ---------------------------------------------------------------------------------------------------------------------

type JsonRecord = Readonly<Record<string, unknown>>;

function recordOf(json: unknown): JsonRecord {
  return typeof json === 'object' && json !== null ? (json as JsonRecord) : {};
}

function isOurs(record: JsonRecord): record is JsonRecord & { code: ErrorCode; message: string } {
  const { code, message } = record;
  return typeof code === 'string' && Object.hasOwn(ERROR_CODES, code) && typeof message === 'string';
}

function ours(record: JsonRecord & { code: ErrorCode; message: string }, details: unknown, levels: number) {
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

/** What is no error is dropped; a code that we do not know stays as a name. */
function causeFrom(json: unknown, levels: number): Error | undefined {
  const record = recordOf(json);
  const { code, name, message, details } = record;
  if (levels === 0 || typeof message !== 'string') return undefined;
  if (isOurs(record)) return ours(record, fewDetails(details), levels - 1);
  const cause = causeFrom(record.cause, levels - 1);
  const error = new Error(cut(message), cause === undefined ? undefined : { cause });
  const named = [name, code].find((word) => typeof word === 'string');
  error.name = cut(named ?? 'Error');
  return Object.assign(error, systemFacts(recordOf(details)));
}

/**
 * The project's errors. Tests and callers match `code`, never text. Whoever first knows an error decides its code and
 * logs it; outer layers add context by `cause` and do not repeat the text.
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

export interface ErrorJson {
  readonly code: ErrorCode;
  readonly message: string;
  readonly remedy?: string;
  readonly step?: string;
  readonly session?: string;
  readonly isRetryable?: boolean;
  readonly details?: unknown;
  readonly cause?: { readonly code?: string; readonly message: string };
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
    const cause = this.cause;
    return {
      code: this.code,
      message: this.message,
      ...(this.remedy === undefined ? {} : { remedy: this.remedy }),
      ...(this.step === undefined ? {} : { step: this.step }),
      ...(this.session === undefined ? {} : { session: this.session }),
      ...(this.isRetryable ? { isRetryable: true } : {}),
      ...(this.details === undefined ? {} : { details: this.details }),
      ...(cause instanceof Error
        ? { cause: { ...(cause instanceof MigrationError ? { code: cause.code } : {}), message: cause.message } }
        : {}),
    };
  }

  /** From a peer's JSON: anything that is not one of our codes is a protocol error, not a new code. */
  static fromJSON(json: unknown, where: string): MigrationError {
    const record = typeof json === 'object' && json !== null ? (json as Record<string, unknown>) : {};
    const { code, message, remedy, step, session, isRetryable, details } = record;
    if (typeof code !== 'string' || !Object.hasOwn(ERROR_CODES, code) || typeof message !== 'string') {
      return new MigrationError('PEER_PROTOCOL', `${where} answered with an error that is not one of ours`);
    }
    return new MigrationError(code as ErrorCode, message, {
      ...(typeof remedy === 'string' ? { remedy } : {}),
      ...(typeof step === 'string' ? { step } : {}),
      ...(typeof session === 'string' ? { session } : {}),
      isRetryable: isRetryable === true,
      ...(details === undefined ? {} : { details }),
    });
  }
}

/** Any thrown value as a MigrationError; what is not ours becomes INTERNAL with the original as cause. */
export function toMigrationError(thrown: unknown, fallback: ErrorCode = 'INTERNAL'): MigrationError {
  if (thrown instanceof MigrationError) return thrown;
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  return new MigrationError(fallback, message, { cause: thrown });
}

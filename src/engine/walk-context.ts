import type { MigrationError } from '../domain/errors.js';
import type { MigrationProgress, PhaseTime } from '../domain/progress.js';
import type { Clock } from './ports/clock.js';
import type { InjectPort } from './ports/inject.js';
import type { AnyStepName, Journal } from './ports/journal.js';

/** The ports that the walk of any kind of job needs. */
export interface WalkPorts {
  readonly journal: Journal;
  readonly clock: Clock;
  readonly inject: InjectPort;
}

export interface EngineLimits {
  /** After the commit: how long nothing may advance before the job needs recovery. It is tried again all the same. */
  readonly recoveryMsMax: number;
  /** Before the commit: how long no page may arrive while the VM runs on the source, before the move is undone. */
  readonly pushQuietMsMax: number;
  /** Deadline of one call to an agent outside a step with its own deadline. */
  readonly callMsMax: number;
  /**
   * Deadline of one undo call. Multiplied by `undoAttempts`, it must stay well below the 5 s in which the VM has to run
   * again.
   */
  readonly undoCallMsMax: number;
  readonly undoAttempts: number;
  /** The first and the longest interval for polling work under way (poll.ts). */
  readonly pollMsFirst: number;
  readonly pollMs: number;
  /** Exponential backoff of retries after the commit. */
  readonly retryMsFirst: number;
  readonly retryMsMax: number;
}

export const ENGINE_LIMITS: EngineLimits = {
  recoveryMsMax: 120_000,
  pushQuietMsMax: 20_000,
  callMsMax: 5_000,
  undoCallMsMax: 1_500,
  undoAttempts: 3,
  pollMsFirst: 5,
  pollMs: 100,
  retryMsFirst: 50,
  retryMsMax: 2_000,
};

export interface RunObserver {
  onStep(step: AnyStepName): void;
  onProgress(progress: MigrationProgress): void;
  /**
   * From here on a cancel is too late: the registry may already name the target, or the clones may be VMs of their own.
   */
  onCommitBegun(): void;
  onCommitted(): void;
  /** The job is committed, but something does not answer. null: it answers again. */
  onRecovering(error: MigrationError | null): void;
  /** Something to log; the job continues. */
  onWarning(message: string, error: unknown): void;
}

export interface Marks {
  startedAtMs: number | null;
  stoppedAtMs: number | null;
  /** When something last advanced after the commit, and how far it was then (pages or bytes, -1: unknown). */
  advancedAtMs: number;
  advancedTo: number;
  /** The known reason why nothing advances. null: nothing is wrong, or something has advanced since. */
  trouble: MigrationError | null;
  /** The job needs recovery, and nothing has advanced since. Its walk then makes one attempt at a time. */
  isStalled: boolean;
}

export function newMarks(startedAtMs: number | null, nowMs: number): Marks {
  return { startedAtMs, stoppedAtMs: null, advancedAtMs: nowMs, advancedTo: -1, trouble: null, isStalled: false };
}

/**
 * Notes a reading of work under way. It counts as an advance only if it is the furthest yet, because a session that
 * connects and breaks again and again does not advance.
 */
export function noteAdvance({ marks }: { readonly marks: Marks }, amount: number, nowMs: number): void {
  if (amount <= marks.advancedTo) return;
  marks.advancedTo = amount;
  marks.trouble = null;
  marks.isStalled = false;
  marks.advancedAtMs = nowMs;
}

/**
 * Reports what keeps the job from advancing, or that nothing does (null). A stalled job is reported again only when
 * something has advanced: an attempt that connects and moves nothing is not a recovery.
 */
export function reportTrouble(
  { marks, observer }: { readonly marks: Marks; readonly observer: RunObserver },
  error: MigrationError | null,
): void {
  if (!marks.isStalled) observer.onRecovering(error);
}

/** The part of a step that the walk needs, whatever the step does. */
export interface WalkStep<Name extends AnyStepName> {
  readonly name: Name;
  readonly host: string;
  readonly timeoutMs: number;
}

/** The context of one walk of one job in one life of the daemon. Jobs do not share it. */
export interface WalkContext<Step extends WalkStep<AnyStepName>> {
  readonly record: { readonly job: string; readonly plan: { readonly steps: readonly Step[] } };
  readonly ports: WalkPorts;
  readonly limits: EngineLimits;
  readonly observer: RunObserver;
  /** Before the commit: the user's cancel. */
  readonly cancel: AbortSignal;
  /** After the commit: the daemon is closing. The session continues, and the next daemon resumes the job. */
  readonly halt: AbortSignal;
  /** Collects what the steps' `forward` returns. */
  readonly findings: object;
  readonly phases: PhaseTime[];
  /** Readings of a clock that does not survive the daemon, so they are not journalled. */
  readonly marks: Marks;
}

/** `forward` may be repeated after the commit. `undo` may always be repeated, even if `forward` never began. */
export interface Executor<Context, Found> {
  forward(context: Context): Promise<Partial<Found> | undefined>;
  undo(context: Context): Promise<void>;
}

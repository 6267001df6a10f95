import type { MigrationError } from '../domain/errors.js';
import type { MigrationProgress, PhaseTime } from '../domain/progress.js';
import type { Clock } from './ports/clock.js';
import type { InjectPort } from './ports/inject.js';
import type { AnyStepName, Journal } from './ports/journal.js';

/** What the walk of a job of any kind needs. */
export interface WalkPorts {
  readonly journal: Journal;
  readonly clock: Clock;
  readonly inject: InjectPort;
}

export interface EngineLimits {
  /** After commit: how long nothing may advance before the engine gives up and asks for `recover`. */
  readonly recoveryMsMax: number;
  /** One call to an agent outside a step with a deadline of its own. */
  readonly callMsMax: number;
  /** One undo call. With `undoAttempts` it must stay well below the 5 s in which the VM has to run again. */
  readonly undoCallMsMax: number;
  readonly undoAttempts: number;
  /** How soon and how rarely the engine looks at work under way (poll.ts). */
  readonly pollMsFirst: number;
  readonly pollMs: number;
  /** Exponential backoff of retries after commit. */
  readonly retryMsFirst: number;
  readonly retryMsMax: number;
}

export const ENGINE_LIMITS: EngineLimits = {
  recoveryMsMax: 120_000,
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
   * From here on a cancel comes too late: the registry may already name the target, the clones may be VMs of their own.
   */
  onCommitBegun(): void;
  onCommitted(): void;
  /** Committed, but something does not answer; null: it answers again. */
  onRecovering(error: MigrationError | null): void;
  /** Worth a line in the daemon's log; the job goes on. */
  onWarning(message: string, error: unknown): void;
}

export interface Marks {
  startedAtMs: number | null;
  stoppedAtMs: number | null;
  /** When something last advanced after the commit, and how far it had come by then (pages or bytes, -1: unknown). */
  advancedAtMs: number;
  advancedTo: number;
  /** Why nothing advances, as far as it has been said; null: nothing is wrong, or it has gone on since. */
  trouble: MigrationError | null;
}

/**
 * Notes how far the work behind the commit has come. A reading counts only if it is the furthest yet: a session that
 * connects and breaks for ever does not advance.
 */
export function noteAdvance({ marks }: { readonly marks: Marks }, amount: number, nowMs: number): void {
  if (amount <= marks.advancedTo) return;
  marks.advancedTo = amount;
  marks.trouble = null;
  marks.advancedAtMs = nowMs;
}

/** A step as the walk sees it, whatever it does. */
export interface WalkStep<Name extends AnyStepName> {
  readonly name: Name;
  readonly host: string;
  readonly timeoutMs: number;
}

/** One walk of one job by one daemon life. Not shared between jobs. */
export interface WalkContext<Step extends WalkStep<AnyStepName>> {
  readonly record: { readonly job: string; readonly plan: { readonly steps: readonly Step[] } };
  readonly ports: WalkPorts;
  readonly limits: EngineLimits;
  readonly observer: RunObserver;
  /** Before commit: the user's cancel. */
  readonly cancel: AbortSignal;
  /** After commit: the daemon is closing; the session goes on and the next daemon takes the job up. */
  readonly halt: AbortSignal;
  /** What the steps' `forward` returns is noted in it. */
  readonly findings: object;
  readonly phases: PhaseTime[];
  /** Set in this daemon's life only; they are readings of a clock that does not survive it. */
  readonly marks: Marks;
}

/** `forward` may be repeated after commit; `undo` may be repeated always, and also when `forward` never began. */
export interface Executor<Context, Found> {
  forward(context: Context): Promise<Partial<Found> | undefined>;
  undo(context: Context): Promise<void>;
}

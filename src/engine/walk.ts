/**
 * The walk of any kind of job: forward through the steps of its plan, and backward if something fails before the
 * commit. Only this file knows how steps are announced, timed, undone and repeated. The procedures say what the steps
 * are, and what a crash in each of them costs (migration/procedure.ts, fork/procedure.ts).
 *
 * Journal: a step is announced before it begins. The first step of a group announces the whole group, and the ends of
 * its steps are written later, so that only the commit is synced between them. Every announced step counts as possibly
 * done.
 */
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { isTransient, isTransientAfterCommit, pause, withDeadline } from './deadline.js';
import type { AnyStepName, JournalEntry } from './ports/journal.js';
import type { Executor, WalkContext, WalkStep } from './walk-context.js';

/**
 * halted: the daemon is closing, or the job was given up, and the journal holds all that is needed. stalled: nothing
 * has advanced for long, or something fails that a repetition does not mend; the caller tries again later. `leftovers`
 * are steps whose undo is still due, in a lost job too.
 */
export type Outcome<Report> =
  | { readonly kind: 'done'; readonly report: Report }
  | { readonly kind: 'undone'; readonly error: MigrationError; readonly leftovers: readonly AnyStepName[] }
  | { readonly kind: 'stalled'; readonly error: MigrationError }
  | { readonly kind: 'lost'; readonly error: MigrationError; readonly leftovers: readonly AnyStepName[] }
  | { readonly kind: 'halted' };

/** What the journal says of the commit: nothing, that it may have taken effect, or that it has. */
export type CommitEvidence = 'none' | 'announced' | 'proven';

/** What distinguishes one kind of job from another. */
export interface Procedure<Name extends AnyStepName, Step extends WalkStep<Name>, Context, Found, Report> {
  readonly executors: { readonly [N in Name]: Executor<Context, Found> };
  readonly commit: Name;
  /** Short calls within this daemon. An undo waits for such a call to end if the walk gave it up. */
  readonly awaitedBeforeUndo: ReadonlySet<Name>;
  /**
   * Steps after the commit whose announcement must be durable. Without the entries of the others, replay only repeats
   * more.
   */
  readonly durableBegins: ReadonlySet<Name>;
  readonly durableEnds: ReadonlySet<Name>;
  firstStepOutOfOrder(steps: readonly Step[]): Name | null;
  isGrouped(step: Step): boolean;
  onAnnounced(context: Context, step: Step, at: string): void;
  /** The host whose steps can be undone at once. Undoing steps of other hosts waits if they do not answer. */
  localHost(context: Context): string;
  /** Returns whether the commit has taken effect. Throws if that cannot be found out. */
  isCommitted(context: Context, evidence: CommitEvidence): Promise<boolean>;
  unknownCommit(context: Context, cause: MigrationError): MigrationError;
  /** After the commit, in a later life of the daemon: returns findings of earlier steps that the journal lacks. */
  restoreFindings(context: Context): Promise<Partial<Found> | undefined>;
  /**
   * Releases what a lost job holds. Failures are logged and have no other effect. Returns the steps that are to be
   * undone once the end of the job is durable.
   */
  releaseLost(context: Context, error: MigrationError): Promise<readonly Name[]>;
  report(context: Context): Report;
}

/** False if the VM belongs to another host by now, or runs there: then there is nothing to undo here. */
export function isWorthAnotherTry(error: MigrationError): boolean {
  return error.code !== 'OWNER_CHANGED' && error.code !== 'CONFLICT' && error.code !== 'QEMU_GONE';
}

/** Nothing mends it: the VM is lost, or has been stopped for good. */
function isFinal({ code }: MigrationError): boolean {
  return code === 'VM_LOST' || code === 'DAMAGED';
}

/** The undo of steps after the commit that leave nothing to undo, even if the job is lost. */
export function neverUndone(): Promise<void> {
  return Promise.reject(new MigrationError('INTERNAL', 'a step after the commit cannot be undone'));
}

const COMMIT_QUESTIONS = 5;

export class Walk<
  Name extends AnyStepName,
  Step extends WalkStep<Name>,
  Context extends WalkContext<Step>,
  Found,
  Report,
> {
  readonly #procedure: Procedure<Name, Step, Context, Found, Report>;
  /** The last call of each walk. After a deadline or a cancel it may still take effect. */
  readonly #inFlight = new WeakMap<Context, { step: Name; work: Promise<unknown> }>();

  constructor(procedure: Procedure<Name, Step, Context, Found, Report>) {
    this.#procedure = procedure;
  }

  /** Walks a new job from its first step. */
  async fromStart(context: Context): Promise<Outcome<Report>> {
    const { ports, observer, marks, record } = context;
    const { before, after } = this.#split(record.plan.steps);
    const wrong = this.#procedure.firstStepOutOfOrder(record.plan.steps);
    if (wrong !== null) throw new MigrationError('INTERNAL', `the plan has "${wrong}" out of order`);
    marks.startedAtMs ??= ports.clock.nowMs();
    const begun: Step[] = [];
    const unwritten: JournalEntry[] = [];
    try {
      for (const [index, step] of before.entries()) {
        context.cancel.throwIfAborted();
        observer.onStep(step.name);
        await this.#announce(context, before, index);
        begun.push(step);
        const end = await this.#forward(context, step, ports.clock.nowMs());
        if (this.#procedure.isGrouped(step)) unwritten.push(end);
        else await ports.journal.append(end);
      }
    } catch (thrown) {
      const error = atStep(thrown, begun.at(-1));
      const isBehindCommit =
        begun.at(-1)?.name === this.#procedure.commit ? await this.#isCommitted(context, 'announced') : false;
      if (isBehindCommit instanceof MigrationError) return this.#unknown(context, error);
      if (!isBehindCommit) return { kind: 'undone', error, leftovers: await this.#undo(context, begun) };
      observer.onWarning('the job is committed, although the commit step failed', error);
    }
    observer.onCommitted();
    return this.#goOn(context, after, unwritten);
  }

  /** Walks a job of an earlier daemon, or a stalled one. `begun` and `ended` come from the journal. */
  async again(
    context: Context,
    journal: {
      readonly begun: ReadonlySet<AnyStepName>;
      readonly ended: ReadonlySet<AnyStepName>;
      readonly isCommitProven: boolean;
    },
  ): Promise<Outcome<Report>> {
    const { before, after } = this.#split(context.record.plan.steps);
    const isAnnounced = journal.begun.has(this.#procedure.commit);
    const evidence = journal.isCommitProven ? 'proven' : isAnnounced ? 'announced' : 'none';
    const isBehindCommit = await this.#isCommitted(context, evidence);
    if (isBehindCommit instanceof MigrationError) return this.#unknown(context, isBehindCommit);
    if (!isBehindCommit) {
      const announced = before.filter(({ name }) => journal.begun.has(name));
      const error = new MigrationError('STEP_FAILED', 'the job was interrupted before its commit, and has been undone');
      return { kind: 'undone', error, leftovers: await this.#undo(context, announced) };
    }
    context.observer.onCommitted();
    await this.#restoreFindings(context);
    // The end of a step proves those of the steps before it, which a full disk may have kept out of the journal.
    const left = after.slice(after.findLastIndex(({ name }) => journal.ended.has(name)) + 1);
    return this.#goOn(context, left, []);
  }

  /** Undoes one step, for leftovers. Throws what the undo throws. */
  async undoStep(context: Context, step: AnyStepName): Promise<void> {
    const { ports, limits } = context;
    const executor = this.#procedure.executors[step as Name];
    await withDeadline(ports.clock, executor.undo(context), limits.undoCallMsMax, `undoing ${step}`).catch(
      (error: unknown) => {
        if (toMigrationError(error).code !== 'NOT_FOUND') throw error;
      },
    );
  }

  #split(steps: readonly Step[]): { readonly before: readonly Step[]; readonly after: readonly Step[] } {
    const index = steps.findIndex(({ name }) => name === this.#procedure.commit) + 1;
    return { before: steps.slice(0, index), after: steps.slice(index) };
  }

  // ---- before the commit

  /**
   * Announces the step at `index`. The first step of a group announces all steps of the group, also those after the
   * commit.
   */
  async #announce(context: Context, before: readonly Step[], index: number): Promise<void> {
    const { record, ports } = context;
    const { steps } = record.plan;
    const step = before[index];
    const isGrouped = (other: Step | undefined): boolean => other !== undefined && this.#procedure.isGrouped(other);
    if (step === undefined || (isGrouped(step) && isGrouped(steps[index - 1]))) return;
    const group: Name[] = [];
    for (let next = index + 1; isGrouped(step) && isGrouped(steps[next]); next++) {
      const name = steps[next]?.name;
      if (name !== undefined) group.push(name);
    }
    const at = ports.clock.isoNow();
    this.#procedure.onAnnounced(context, step, at);
    await ports.journal.append({
      type: 'begin',
      job: record.job,
      step: step.name,
      at,
      ...(group.length > 0 ? { group } : {}),
    });
  }

  /** Runs the step. `startMs` is the start of the first attempt. */
  async #forward(context: Context, step: Step, startMs: number): Promise<JournalEntry> {
    const { ports, record, findings, phases } = context;
    const { executors, commit } = this.#procedure;
    await ports.inject.hit(`before:${step.name}`);
    const isCommit = step.name === commit;
    if (isCommit) {
      context.cancel.throwIfAborted();
      context.observer.onCommitBegun();
    }
    const work = executors[step.name].forward(context);
    this.#inFlight.set(context, { step: step.name, work });
    const isAfter = this.#split(record.plan.steps).after.some(({ name }) => name === step.name);
    const signal = isCommit ? undefined : isAfter ? context.halt : context.cancel;
    const result = await withDeadline(ports.clock, work, step.timeoutMs, step.name, signal);
    const ms = ports.clock.nowMs() - startMs;
    Object.assign(findings, result);
    await ports.inject.hit(`after:${step.name}`);
    phases.push({ name: step.name, ms });
    return { type: 'end', job: record.job, step: step.name, ms, ...(result === undefined ? {} : { result }) };
  }

  async #undo(context: Context, begun: readonly Step[]): Promise<Name[]> {
    const leftovers: Name[] = [];
    for (const { name } of [...begun].reverse()) {
      try {
        await this.#undoBounded(context, name);
      } catch (thrown) {
        const error = toMigrationError(thrown);
        context.observer.onWarning(`undoing ${name} failed`, error);
        if (isWorthAnotherTry(error)) {
          leftovers.push(name);
          await appendBestEffort(context, { type: 'leftover', job: context.record.job, step: name });
        }
      }
    }
    return leftovers;
  }

  async #undoBounded(context: Context, step: Name): Promise<void> {
    const { ports, limits, record } = context;
    const pending = this.#inFlight.get(context);
    if (pending?.step === step && this.#procedure.awaitedBeforeUndo.has(step)) {
      await withDeadline(ports.clock, pending.work, limits.undoCallMsMax, step).catch(() => undefined);
    }
    const host = record.plan.steps.find(({ name }) => name === step)?.host;
    const isLocal = host === this.#procedure.localHost(context);
    for (let attempt = 1; ; attempt++) {
      try {
        await appendBestEffort(context, { type: 'undo', job: record.job, step });
        await ports.inject.hit(`undo:${step}`);
        return await this.undoStep(context, step);
      } catch (thrown) {
        const error = toMigrationError(thrown);
        // A silent remote host probably stays silent for a while. Its step becomes a leftover at once, so that nothing
        // waits for it.
        const isSilent = !isLocal || error.code === 'UNREACHABLE';
        if (isSilent || attempt >= limits.undoAttempts || !isWorthAnotherTry(error)) throw error;
        await ports.clock.sleep(limits.retryMsFirst).catch(() => undefined);
      }
    }
  }

  /** Ends a job that cannot be finished, and frees what it holds. */
  async giveUp(context: Context, error: MigrationError): Promise<Outcome<Report>> {
    return { kind: 'lost', error, leftovers: await this.#procedure.releaseLost(context, error) };
  }

  /** Returns the error of the last attempt if it cannot be found out. */
  async #isCommitted(context: Context, evidence: CommitEvidence): Promise<boolean | MigrationError> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#procedure.isCommitted(context, evidence);
      } catch (error) {
        context.observer.onWarning('it is not known whether the commit took effect', error);
        // The VM may run on the target and wait for pages, so a proven commit waits for nothing.
        if (evidence === 'proven') return true;
        if (attempt >= COMMIT_QUESTIONS) return toMigrationError(error);
        await context.ports.clock.sleep(context.limits.retryMsFirst).catch(() => undefined);
      }
    }
  }

  /** Restores findings that only the report needs. */
  async #restoreFindings(context: Context): Promise<void> {
    try {
      Object.assign(context.findings, await this.#procedure.restoreFindings(context));
    } catch (error) {
      context.observer.onWarning('the report lacks what the job found before the commit', error);
    }
  }

  #unknown(context: Context, cause: MigrationError): Outcome<Report> {
    return { kind: 'stalled', error: this.#procedure.unknownCommit(context, cause) };
  }

  // ---- after the commit

  async #goOn(context: Context, steps: readonly Step[], unwritten: JournalEntry[]): Promise<Outcome<Report>> {
    const { ports, observer, limits, marks, halt } = context;
    try {
      for (const step of steps) {
        // A grouped step was announced with its group, so nothing is written before it has ended.
        const isGrouped = this.#procedure.isGrouped(step);
        const startMs = ports.clock.nowMs();
        if (!marks.isStalled) marks.advancedAtMs = startMs;
        let retryMs = limits.retryMsFirst;
        let retryAdvancedAtMs = startMs;
        for (;;) {
          try {
            halt.throwIfAborted();
            observer.onStep(step.name);
            if (!isGrouped) await flush(context, unwritten);
            if (!isGrouped) await this.#announceAfterCommit(context, step);
            const end = await this.#forward(context, step, startMs);
            marks.isStalled = false;
            observer.onRecovering(null);
            await flush(context, unwritten);
            if (this.#procedure.durableEnds.has(step.name)) await retryable(ports.journal.append(end));
            else await appendBestEffort(context, end);
            break;
          } catch (thrown) {
            const error = toMigrationError(thrown);
            if (halt.aborted) return { kind: 'halted' };
            if (isFinal(error)) return await this.giveUp(context, error);
            const quietMs = ports.clock.nowMs() - marks.advancedAtMs;
            if (marks.isStalled || !isTransientAfterCommit(error) || quietMs > limits.recoveryMsMax) {
              marks.isStalled = true;
              await flush(context, unwritten);
              return { kind: 'stalled', error: stalled(error, step, quietMs) };
            }
            observer.onRecovering(atStep(error, step));
            await flush(context, unwritten);
            if (marks.advancedAtMs > retryAdvancedAtMs) retryMs = limits.retryMsFirst;
            retryAdvancedAtMs = marks.advancedAtMs;
            await pause(ports.clock, retryMs, halt);
            retryMs = Math.min(retryMs * 2, limits.retryMsMax);
          }
        }
      }
    } catch (thrown) {
      if (halt.aborted) return { kind: 'halted' };
      throw thrown;
    }
    return { kind: 'done', report: this.#procedure.report(context) };
  }

  async #announceAfterCommit(context: Context, step: Step): Promise<void> {
    const { ports, record } = context;
    const begin: JournalEntry = { type: 'begin', job: record.job, step: step.name, at: ports.clock.isoNow() };
    if (this.#procedure.durableBegins.has(step.name)) await retryable(ports.journal.append(begin));
    else await appendBestEffort(context, begin);
  }
}

type AnyContext = WalkContext<WalkStep<AnyStepName>>;

/** Appends an entry that replay can do without. A failure is only logged: a full disk must not keep the VM stopped. */
async function appendBestEffort({ ports, limits, observer }: AnyContext, entry: JournalEntry): Promise<void> {
  try {
    await withDeadline(ports.clock, ports.journal.append(entry), limits.undoCallMsMax, 'writing the journal');
  } catch (error) {
    observer.onWarning(`the journal lacks an entry (${entry.type})`, error);
  }
}

async function flush(context: AnyContext, entries: JournalEntry[]): Promise<void> {
  for (const entry of entries.splice(0)) await appendBestEffort(context, entry);
}

async function retryable(appending: Promise<void>): Promise<void> {
  try {
    await appending;
  } catch (thrown) {
    const error = toMigrationError(thrown);
    throw new MigrationError(error.code, error.message, { isRetryable: true, cause: error });
  }
}

function atStep(thrown: unknown, step: WalkStep<AnyStepName> | undefined): MigrationError {
  const error = toMigrationError(thrown);
  if (step === undefined || error.step !== undefined || error.code === 'CANCELLED') return error;
  return new MigrationError('STEP_FAILED', `${step.name} on ${step.host} failed: ${error.message}`, {
    step: step.name,
    isRetryable: isTransient(error),
    ...(error.remedy === undefined ? {} : { remedy: error.remedy }),
    ...(error.details === undefined ? {} : { details: error.details }),
    cause: error,
  });
}

function stalled(error: MigrationError, step: WalkStep<AnyStepName>, quietMs: number): MigrationError {
  if (error.code === 'NEEDS_RECOVERY') return error;
  return new MigrationError('NEEDS_RECOVERY', `${step.name} on ${step.host} keeps failing: ${error.message}`, {
    step: step.name,
    remedy: error.remedy ?? 'nothing is lost: repair the cause; the job goes on by itself',
    details: { quietMs: Math.round(quietMs) },
    cause: error,
  });
}

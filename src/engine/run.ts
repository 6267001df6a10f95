/**
 * Walks a plan's steps forward, and backward when something fails before the commit. The only place that knows phase order and deadlines.
 *
 * Who holds the only good copy of the VM while a step is under way, and what the crash of each process then costs. "Undone" means: the VM runs
 * on the source again and nothing is left on the target. SD, TD: daemon of source, target; SQ, TQ: their QEMU.
 *
 *   step           good copy          SD dies               TD dies              SQ dies          TQ dies             network cut
 *   -------------  -----------------  --------------------  -------------------  ---------------  ------------------  -----------------
 *   reserve        source, running    undone at restart     nothing              VM dies (1)      -                   nothing
 *   prepareTarget  source, running    undone at restart     undone (2)           VM dies (1)      undone              undone (2)
 *   exposeSource   source, running    undone at restart     undone (2)           VM dies (1)      undone              undone (2)
 *   connectTarget  source, running    undone at restart     undone (2)           VM dies (1)      undone              undone (2)
 *   nativeStart    source, running    undone at restart     undone (2)           VM dies (1)      undone              undone (2)
 *   stopSource     source, stopped    stopped until restart undone (2)           VM dies (1)      undone              undone (2)
 *   transferState  source, stopped    stopped until restart undone (2)           VM dies (1)      undone              undone (2)
 *   nativeSwitch.  source, stopped    stopped until restart undone (2)           VM dies (1)      undone              undone (2)
 *   commit         both, stopped      restart asks the      waits for TD         nothing (3)      VM lost (4)         waits for network
 *                                     registry and undoes
 *                                     or goes on
 *   resumeTarget   both until it runs goes on at restart    waits for TD         nothing (3)      VM lost (4)         waits for network
 *   drain          target's pages     missing pages wait    all missing pages    nothing (3);     VM lost             missing pages wait
 *                  and source's rest  for SD                wait for TD          native: VM lost                      for network (5)
 *   releaseSource  target, running    goes on at restart    goes on at restart   nothing          VM dies (1)         goes on later
 *
 *   (1) As it would without a migration.
 *   (2) The VM runs again at once; what is left on a target that does not answer is journalled as a leftover and cleaned up when it answers.
 *   (3) The frozen memory is in files that the daemon serves; QEMU is not needed for it.
 *   (4) The source keeps the stopped VM, complete, but never resumes it by itself: only a person can know that the target will not run it.
 *   (5) Native post-copy: QEMU pauses; needs a person.
 *
 * Journal: a step is announced before it begins. The steps of the blackout are announced together, before the VM is stopped, and their ends are
 * written when the VM runs again: so the one fsync inside the blackout (here; the target makes its own) is the compare-and-swap in the registry,
 * which alone decides what a restarted daemon does with a job. Everything announced counts as possibly done.
 */
import type { MigrationReport, PlanStep, StepName } from '../domain.js';
import { MigrationError, toMigrationError } from '../errors.js';
import { firstStepOutOfOrder, PLAN_STEPS_AFTER_COMMIT } from '../planner/plan.js';
import type { StepContext, StepExecutor } from './context.js';
import { mayPass, mayPassAfterCommit, pause, withDeadline } from './deadline.js';
import { drain, releaseSource } from './phases/drain.js';
import { nativeStart, nativeSwitchover } from './phases/native.js';
import { connectTarget, exposeSource, prepareTarget, reserve } from './phases/prepare.js';
import { commit, isCommitted, resumeTarget, stopSource, transferState } from './phases/switchover.js';
import type { JournalEntry } from './ports.js';
import { buildReport } from './report.js';

const EXECUTORS: { readonly [Name in StepName]: StepExecutor } = {
  reserve,
  prepareTarget,
  exposeSource,
  connectTarget,
  stopSource,
  transferState,
  commit,
  resumeTarget,
  drain,
  releaseSource,
  nativeStart,
  nativeSwitchover,
};

/** halted: the daemon is closing; the journal already says all that the next one needs. stalled: `recover` goes on. */
export type Outcome =
  | { readonly kind: 'done'; readonly report: MigrationReport }
  | { readonly kind: 'undone'; readonly error: MigrationError; readonly leftovers: readonly StepName[] }
  | { readonly kind: 'stalled'; readonly error: MigrationError }
  | { readonly kind: 'lost'; readonly error: MigrationError }
  | { readonly kind: 'halted' };

/** A new job from its first step. */
export async function runFromStart(context: StepContext): Promise<Outcome> {
  const { steps } = context.record.plan;
  const wrong = firstStepOutOfOrder(steps);
  if (wrong !== null) throw new MigrationError('INTERNAL', `the plan has "${wrong}" out of order`);
  context.marks.startedAtMs = context.ports.clock.nowMs();
  const split = steps.findIndex(({ name }) => name === 'commit') + 1;
  const begun: PlanStep[] = [];
  const unwritten: JournalEntry[] = [];
  try {
    for (const [index, step] of steps.slice(0, split).entries()) {
      context.cancel.throwIfAborted();
      context.observer.onStep(step.name);
      await announce(context, steps, index);
      begun.push(step);
      const end = await forward(context, step, context.ports.clock.nowMs());
      if (step.isInBlackout) unwritten.push(end);
      else await context.ports.journal.append(end);
    }
  } catch (thrown) {
    const error = atStep(thrown, begun.at(-1));
    const isBehindCommit = begun.at(-1)?.name === 'commit' ? await askRegistry(context) : false;
    if (isBehindCommit === 'unknown') return { kind: 'stalled', error: unknownCommit(context, error) };
    if (!isBehindCommit) return { kind: 'undone', error, leftovers: await undo(context, begun) };
    context.observer.onWarning('committed, although the commit did not end well', error);
  }
  context.observer.onCommitted();
  return goOn(context, steps.slice(split), unwritten);
}

/** A job of an earlier daemon, or one that has stalled. `begun` and `ended` are what the journal says. */
export async function runAgain(
  context: StepContext,
  {
    begun,
    ended,
    isCommitProven,
  }: { begun: ReadonlySet<StepName>; ended: ReadonlySet<StepName>; isCommitProven: boolean },
): Promise<Outcome> {
  const { steps } = context.record.plan;
  const split = steps.findIndex(({ name }) => name === 'commit') + 1;
  const isBehindCommit = isCommitProven || (await askRegistry(context));
  if (isBehindCommit === 'unknown') {
    return {
      kind: 'stalled',
      error: unknownCommit(context, new MigrationError('CORRUPT', 'the registry does not answer')),
    };
  }
  if (!isBehindCommit) {
    const announced = steps.slice(0, split).filter(({ name }) => begun.has(name));
    const error = new MigrationError(
      'STEP_FAILED',
      'the daemon ended before the commit; the job was undone at its restart',
    );
    return { kind: 'undone', error, leftovers: await undo(context, announced) };
  }
  context.observer.onCommitted();
  const left = steps.slice(split).filter(({ name }) => !ended.has(name));
  return goOn(context, left, []);
}

/** One undo, for leftovers. Throws what the undo throws. */
export async function undoStep(context: StepContext, step: StepName): Promise<void> {
  const { ports, limits } = context;
  await withDeadline(ports.clock, EXECUTORS[step].undo(context), limits.undoCallMsMax, `undoing ${step}`).catch(
    (error: unknown) => {
      if (toMigrationError(error).code !== 'NOT_FOUND') throw error;
    },
  );
}

// ---- before the commit ------------------------------------------------------------------------------------------------------------------

/** Announces the step at `index`, and with the first step of the blackout all of the blackout's. */
async function announce(
  { record, ports, findings }: StepContext,
  steps: readonly PlanStep[],
  index: number,
): Promise<void> {
  const step = steps[index];
  if (step === undefined || (step.isInBlackout && steps[index - 1]?.isInBlackout === true)) return;
  const group: StepName[] = [];
  for (let next = index + 1; step.isInBlackout && steps[next]?.isInBlackout === true; next++) {
    const name = steps[next]?.name;
    if (name !== undefined) group.push(name);
  }
  const at = ports.clock.isoNow();
  if (step.isInBlackout) findings.stoppedAt = at;
  await ports.journal.append({
    type: 'begin',
    job: record.job,
    step: step.name,
    at,
    ...(group.length > 0 ? { group } : {}),
  });
}

/** `startMs`: of the first attempt. */
async function forward(context: StepContext, step: PlanStep, startMs: number): Promise<JournalEntry> {
  const { ports, record, findings, phases } = context;
  await ports.faults.hit(`before:${step.name}`);
  const isCommit = step.name === 'commit';
  if (isCommit) {
    context.cancel.throwIfAborted();
    context.observer.onCommitBegun();
  }
  const work = EXECUTORS[step.name].forward(context);
  inFlight.set(context, { step: step.name, work });
  const signal = isCommit ? undefined : isAfterCommit(step.name) ? context.halt : context.cancel;
  const result = await withDeadline(ports.clock, work, step.timeoutMs, step.name, signal);
  const ms = ports.clock.nowMs() - startMs;
  Object.assign(findings, result);
  await ports.faults.hit(`after:${step.name}`);
  phases.push({ name: step.name, ms });
  return { type: 'end', job: record.job, step: step.name, ms, ...(result === undefined ? {} : { result }) };
}

/** The call that a deadline or a cancel gave up on may still take effect; undo waits for it where it is local and short. */
const inFlight = new WeakMap<StepContext, { step: StepName; work: Promise<unknown> }>();
const SHORT_SOURCE_STEPS: ReadonlySet<StepName> = new Set<StepName>(['reserve', 'exposeSource', 'stopSource']);

async function undo(context: StepContext, begun: readonly PlanStep[]): Promise<StepName[]> {
  const leftovers: StepName[] = [];
  for (const { name } of [...begun].reverse()) {
    try {
      await undoBounded(context, name);
    } catch (thrown) {
      const error = toMigrationError(thrown);
      context.observer.onWarning(`undoing ${name} failed`, error);
      if (isWorthAnotherTry(error)) {
        leftovers.push(name);
        await noteDown(context, { type: 'leftover', job: context.record.job, step: name });
      }
    }
  }
  return leftovers;
}

/** A VM that belongs to another host by now, or runs there, is not for us to undo. */
export function isWorthAnotherTry(error: MigrationError): boolean {
  return error.code !== 'OWNER_CHANGED' && error.code !== 'CONFLICT' && error.code !== 'QEMU_GONE';
}

async function undoBounded(context: StepContext, step: StepName): Promise<void> {
  const { ports, limits, record } = context;
  const pending = inFlight.get(context);
  if (pending?.step === step && SHORT_SOURCE_STEPS.has(step)) {
    await withDeadline(ports.clock, pending.work, limits.undoCallMsMax, step).catch(() => undefined);
  }
  const isLocal = stepHost(context, step) === record.plan.source;
  for (let attempt = 1; ; attempt++) {
    try {
      await noteDown(context, { type: 'undo', job: record.job, step });
      await ports.faults.hit(`undo:${step}`);
      return await undoStep(context, step);
    } catch (thrown) {
      const error = toMigrationError(thrown);
      // A remote host that is silent stays silent for a while: it becomes a leftover at once, so that nothing waits for it.
      if (!isLocal || attempt >= limits.undoAttempts || !isWorthAnotherTry(error)) throw error;
      await ports.clock.sleep(limits.retryMsFirst).catch(() => undefined);
    }
  }
}

function stepHost({ record }: StepContext, step: StepName): string | undefined {
  return record.plan.steps.find(({ name }) => name === step)?.host;
}

/** For entries that replay can do without: a full disk must not keep the VM from running. */
async function noteDown({ ports, limits, observer }: StepContext, entry: JournalEntry): Promise<void> {
  try {
    await withDeadline(ports.clock, ports.journal.append(entry), limits.undoCallMsMax, 'writing the journal');
  } catch (error) {
    observer.onWarning(`the journal lacks an entry (${entry.type})`, error);
  }
}

const REGISTRY_ATTEMPTS = 5;

async function askRegistry(context: StepContext): Promise<boolean | 'unknown'> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await isCommitted(context);
    } catch (error) {
      context.observer.onWarning('the registry cannot say whether the commit took effect', error);
      if (attempt >= REGISTRY_ATTEMPTS) return 'unknown';
      await context.ports.clock.sleep(context.limits.retryMsFirst).catch(() => undefined);
    }
  }
}

function unknownCommit({ record }: StepContext, cause: MigrationError): MigrationError {
  const { vm, target } = record.plan.request;
  return new MigrationError('NEEDS_RECOVERY', `it is not known whether ${vm} belongs to ${target} now`, {
    remedy:
      'the VM is stopped and complete on both hosts; repair the registry, restart the daemon, then recover the job',
    cause,
  });
}

function atStep(thrown: unknown, step: PlanStep | undefined): MigrationError {
  const error = toMigrationError(thrown);
  if (step === undefined || error.step !== undefined || error.code === 'CANCELLED') return error;
  return new MigrationError('STEP_FAILED', `${step.name} on ${step.host} failed: ${error.message}`, {
    step: step.name,
    isRetryable: mayPass(error),
    ...(error.remedy === undefined ? {} : { remedy: error.remedy }),
    cause: error,
  });
}

// ---- after the commit -------------------------------------------------------------------------------------------------------------------

function isAfterCommit(step: StepName): boolean {
  return PLAN_STEPS_AFTER_COMMIT.includes(step);
}

async function goOn(context: StepContext, steps: readonly PlanStep[], unwritten: JournalEntry[]): Promise<Outcome> {
  const { ports, observer, limits, marks, halt, record } = context;
  try {
    for (const step of steps) {
      const startMs = ports.clock.nowMs();
      marks.advancedAtMs = startMs;
      let retryMs = limits.retryMsFirst;
      let retryAdvancedAtMs = startMs;
      for (;;) {
        try {
          halt.throwIfAborted();
          observer.onStep(step.name);
          // resumeTarget was announced with the rest of the blackout.
          if (step.name !== 'resumeTarget') await announceAfterCommit(context, step);
          const end = await forward(context, step, startMs);
          observer.onRecovering(null);
          await flush(context, unwritten);
          await appendAfterCommit(context, end, step);
          break;
        } catch (thrown) {
          const error = toMigrationError(thrown);
          if (halt.aborted) return { kind: 'halted' };
          if (error.code === 'VM_LOST') {
            await letGo(context);
            return { kind: 'lost', error };
          }
          const nowMs = ports.clock.nowMs();
          if (!mayPassAfterCommit(error) || nowMs - marks.advancedAtMs > limits.recoveryMsMax) {
            return { kind: 'stalled', error: stalled(error, step, nowMs - marks.advancedAtMs) };
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
  return { kind: 'done', report: buildReport(context) };

  async function flush(flushing: StepContext, entries: JournalEntry[]): Promise<void> {
    for (const entry of entries.splice(0)) await noteDown(flushing, entry);
  }

  async function announceAfterCommit(announcing: StepContext, step: PlanStep): Promise<void> {
    const begin: JournalEntry = { type: 'begin', job: record.job, step: step.name, at: ports.clock.isoNow() };
    // Release destroys the source's memory, so its announcement has to be durable; without the others replay just repeats more.
    if (step.name === 'releaseSource') await retryable(ports.journal.append(begin));
    else await noteDown(announcing, begin);
  }

  async function appendAfterCommit(ending: StepContext, end: JournalEntry, step: PlanStep): Promise<void> {
    if (step.name === 'drain') await retryable(ports.journal.append(end));
    else await noteDown(ending, end);
  }
}

/** Nobody fetches from the source any more, and what it keeps is its user's: `stop` frees it. What fails here is said, and harms nothing else. */
async function letGo({ record, ports, limits, observer }: StepContext): Promise<void> {
  const { vm } = record.plan.request;
  const calls: [string, () => Promise<void>][] = [
    ['unexposing', () => ports.source.unexpose(record.session)],
    ['unreserving', () => ports.source.unreserve(vm, record.job)],
  ];
  for (const [doing, call] of calls) {
    try {
      await withDeadline(ports.clock, call(), limits.callMsMax, `${doing} ${vm}`);
    } catch (error) {
      observer.onWarning(`${doing} a lost VM failed`, error);
    }
  }
}

async function retryable(appending: Promise<void>): Promise<void> {
  try {
    await appending;
  } catch (thrown) {
    const error = toMigrationError(thrown);
    throw new MigrationError(error.code, error.message, { isRetryable: true, cause: error });
  }
}

function stalled(error: MigrationError, step: PlanStep, quietMs: number): MigrationError {
  if (error.code === 'NEEDS_RECOVERY') return error;
  return new MigrationError('NEEDS_RECOVERY', `${step.name} on ${step.host} does not succeed: ${error.message}`, {
    step: step.name,
    remedy: 'nothing is lost: see to what the cause names, then recover the job',
    details: { quietMs: Math.round(quietMs) },
    cause: error,
  });
}

/**
 * The steps of a fork. The agent does the work. This file says what each step asks the agent for, what counts as
 * success, and what undoes the step.
 */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneFailure } from '../../domain/fork.js';
import { Rate } from '../../kit/rate.js';
import { pause, withDeadline } from '../deadline.js';
import { PollPace } from '../poll.js';
import type { ForkProgress } from '../ports/fork.js';
import { describeProgress, troubleOf } from '../progress.js';
import { type CommitEvidence, neverUndone } from '../walk.js';
import { noteAdvance, reportTrouble } from '../walk-context.js';
import type { ForkExecutor, ForkFindings, ForkStepContext } from './context.js';

/** Names the origin of errors that come as JSON. */
const AGENT = 'the agent';

/** The undo of prepareClones removes the whole fork, so the later steps have nothing left to undo. */
const undoneWithClones = (): Promise<void> => Promise.resolve();

export const reserveParent: ForkExecutor = {
  async forward({ record, ports }) {
    await ports.parent.reserve(parentOf(record), record.job);
    return undefined;
  },
  /**
   * The parent is free only when nothing of the fork is left: a later undo would resume a VM that another job may have
   * moved by then.
   */
  async undo({ record, ports }) {
    await ports.forks.discardFork(record.fork);
    await ports.parent.unreserve(parentOf(record), record.job);
  },
};

export const prepareClones: ForkExecutor = {
  async forward(context) {
    const { record, ports } = context;
    const { isWarm, image, clones, failures } = await ports.forks.prepareClones({
      fork: record.fork,
      job: record.job,
      ...record.plan.request,
    });
    const named = acceptedFailures(context, clones.length, failures, 'prepared');
    return { image, isWarm, clones, failures: named };
  },
  /** The agent releases the parent first: it runs again, unprotected, before anything else is removed. */
  async undo({ record, ports }) {
    await ports.forks.discardFork(record.fork);
  },
};

export const armParent: ForkExecutor = {
  async forward({ record, ports }) {
    await ports.forks.armParent(record.fork);
    return undefined;
  },
  undo: undoneWithClones,
};

export const connectHosts: ForkExecutor = {
  forward: () => Promise.resolve(undefined),
  undo: undoneWithClones,
};

export const forkPoint: ForkExecutor = {
  async forward({ record, ports }) {
    const { parentPauseMs, deviceStateBytes, parts } = await ports.forks.forkPoint(record.fork);
    return { parentPauseMs, deviceStateBytes, pauseParts: parts };
  },
  undo: undoneWithClones,
};

export const loadClones: ForkExecutor = {
  async forward(context) {
    const { record, ports, findings } = context;
    const { failures } = await ports.forks.loadClones(record.fork);
    const named = acceptedFailures(context, findings.clones.length - failures.length, failures, 'loaded');
    return { failures: [...findings.failures, ...named] };
  },
  undo: undoneWithClones,
};

/** A step of earlier builds, whose jobs are only undone or continued behind their commit. */
export const startClones: ForkExecutor = {
  forward: () => Promise.reject(new MigrationError('INTERNAL', 'no plan of this build has the step startClones')),
  undo: undoneWithClones,
};

export const commitFork: ForkExecutor = {
  async forward({ record, ports }) {
    await ports.forks.commitFork(record.fork);
    return undefined;
  },
  /** Reached only if the commit has not taken effect. */
  undo: undoneWithClones,
};

/**
 * Returns whether the commit took effect. Only the agent's record decides, and the question is the undo itself: it
 * removes an uncommitted fork, so a commit that is still under way cannot take effect after the answer.
 */
export async function isForkCommitted(
  { record, ports, limits }: ForkStepContext,
  evidence: CommitEvidence,
): Promise<boolean> {
  if (evidence === 'proven') return true;
  try {
    const discarding = ports.forks.discardFork(record.fork);
    await withDeadline(ports.clock, discarding, limits.undoCallMsMax, 'discarding the fork');
    return false;
  } catch (thrown) {
    const { code } = toMigrationError(thrown);
    if (code === 'CONFLICT') return true;
    if (code === 'NOT_FOUND') return false;
    throw thrown;
  }
}

/** The fork is committed, so a clone that cannot run is only named. */
export const runClones: ForkExecutor = {
  async forward(context) {
    const { record, ports, findings, marks } = context;
    const beganMs = sinceRequestMs(context);
    const reply = await unlessForgotten(ports.forks.runClones(record.fork));
    if (reply === null) return undefined;
    // The answer of an earlier call may be among the findings.
    const known = new Set(findings.failures.map(({ index }) => index));
    const others = reply.failures.filter(({ index }) => !known.has(index));
    return {
      // In a later life of the daemon only the agent had these. From here on the journal has them.
      ...(marks.startedAtMs === null ? beforeCommit(findings) : {}),
      ready: reply.ready.map(({ index, atMs }) => ({ index, readyMs: Math.max(0, beganMs + atMs) })),
      failures: [...findings.failures, ...inJson(others)],
    };
  },
  undo: neverUndone,
};

export const fillImage: ForkExecutor = {
  async forward(context) {
    const { ports, limits, marks, halt, observer, record } = context;
    const pace = new PollPace(limits);
    const rate = new Rate();
    for (;;) {
      const progress = await askProgress(context);
      if (progress === null) return undefined;
      const nowMs = ports.clock.nowMs();
      noteAdvance(context, progress.pagesDone, nowMs);
      rate.note(nowMs, copiedBytes(progress));
      const described = describeProgress({
        ...progress,
        bytesDone: copiedBytes(progress),
        bytesPerS: rate.bytesPerS,
        faultCount: (progress.counters.cloneFaultCount ?? 0) + (progress.counters.parentFaultCount ?? 0),
      });
      observer.onProgress(described);
      if (progress.state === 'complete') return { counters: progress.counters, pageBytes: progress.pageBytes };
      if (progress.state === 'failed') throw incomplete(context, progress.error);
      reportTrouble(context, null);
      if (nowMs - marks.advancedAtMs > limits.recoveryMsMax) {
        throw new MigrationError('NEEDS_RECOVERY', `no page has been copied for ${limits.recoveryMsMax} ms`, {
          remedy: `check the load of ${record.plan.host}; the job goes on by itself`,
          cause: troubleOf(progress, AGENT),
        });
      }
      await pause(ports.clock, pace.nextMs(described.secondsLeft), halt);
    }
  },
  undo: neverUndone,
};

export const releaseParent: ForkExecutor = {
  async forward({ record, ports }) {
    try {
      await ports.forks.finishFork(record.fork);
    } catch (thrown) {
      // An earlier attempt, whose answer was lost, has finished the fork.
      if (toMigrationError(thrown).code !== 'NOT_FOUND') throw thrown;
    }
    const { vm } = record.plan.request;
    if (vm !== null) await ports.parent.unreserve(vm, record.job);
    return undefined;
  },
  undo: neverUndone,
};

function askProgress({ record, ports, limits }: ForkStepContext): Promise<ForkProgress | null> {
  const asking = ports.forks.forkProgress(record.fork);
  return unlessForgotten(withDeadline(ports.clock, asking, limits.callMsMax, 'asking how full the image is'));
}

/**
 * Returns null if the agent has forgotten the fork. It does so only when the clones have run and the image is complete:
 * an earlier life of the daemon has finished the fork without journalling it.
 */
async function unlessForgotten<T>(asking: Promise<T>): Promise<T | null> {
  try {
    return await asking;
  } catch (thrown) {
    if (toMigrationError(thrown).code === 'NOT_FOUND') return null;
    throw thrown;
  }
}

function beforeCommit({ image, isWarm, clones, parentPauseMs, deviceStateBytes }: ForkFindings): Partial<ForkFindings> {
  return { image, isWarm, clones, parentPauseMs, deviceStateBytes };
}

/** Time since the request, also in a later life of the daemon. */
function sinceRequestMs({ record, ports, marks }: ForkStepContext): number {
  return marks.startedAtMs === null
    ? Date.parse(ports.clock.isoNow()) - Date.parse(record.createdAt)
    : ports.clock.nowMs() - marks.startedAtMs;
}

function parentOf({ plan }: ForkStepContext['record']): string {
  const { vm } = plan.request;
  if (vm === null) throw new MigrationError('INTERNAL', 'the plan reserves a parent, but the request has none');
  return vm;
}

/**
 * Returns the failures with their errors as JSON. Throws if no clone succeeded, or if one failed and the request
 * demands all of them.
 */
function acceptedFailures(
  { record }: ForkStepContext,
  count: number,
  failures: readonly CloneFailure[],
  done: string,
): CloneFailure[] {
  const named = inJson(failures);
  const first = failures[0];
  if (first === undefined && count > 0) return named;
  if (record.plan.request.isPartialAllowed && count > 0) return named;
  const cause = first === undefined ? undefined : MigrationError.from(first.error, AGENT);
  const others = failures.length > 1 ? ` (and ${failures.length - 1} more)` : '';
  const what = first === undefined ? 'no clone' : `clone ${first.name}${others}`;
  throw new MigrationError(
    cause?.code ?? 'INTERNAL',
    `${what} could not be ${done}: ${cause?.message ?? 'no reason given'}`,
    {
      ...(cause?.remedy === undefined ? {} : { remedy: cause.remedy }),
      details: named,
      ...(cause === undefined ? {} : { cause }),
    },
  );
}

function inJson(failures: readonly CloneFailure[]): CloneFailure[] {
  return failures.map((failure) => ({ ...failure, error: MigrationError.from(failure.error, AGENT).toJSON() }));
}

function incomplete({ record, findings }: ForkStepContext, thrown: unknown): MigrationError {
  const cause = MigrationError.from(thrown, AGENT);
  const { parent } = record.plan;
  const image = findings.image ?? record.fork;
  const remedy =
    `${parent} is not affected; ` +
    `remove what is left with "vmctl stop --image ${image}" and "vmctl image rm ${image}"`;
  return new MigrationError(
    'VM_LOST',
    `the image of ${parent} cannot be completed, so its clones have been ended: ${cause.message}`,
    { remedy, cause },
  );
}

function copiedBytes({ counters, pagesDone, pageBytes }: ForkProgress): number {
  return counters.copiedBytes ?? pagesDone * pageBytes;
}

/**
 * The steps of a fork up to its commit. The agents do the work. This file says what each step asks them for, what
 * counts as success, and what undoes the step. after-commit.ts has the other steps.
 */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneFailure, CloneIdentity } from '../../domain/fork.js';
import { withDeadline } from '../deadline.js';
import type { PrepareForkReply, PrepareForkRequest } from '../ports/fork.js';
import type { CommitEvidence } from '../walk.js';
import type { ForkExecutor, ForkJobRecord, ForkStepContext } from './context.js';
import {
  checkIdentities,
  discardJoined,
  failuresOf,
  inOrder,
  joinedHosts,
  leaveOut,
  onAllNeeded,
  ownShare,
  withOthers,
} from './hosts.js';
import { originOf } from './origin.js';

/** Names the origin of errors that come as JSON. */
export const AGENT = 'the agent';

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
    const joined = joinedHosts(context);
    const share = ownShare(record);
    const request: PrepareForkRequest = {
      ...{ fork: record.fork, job: record.job, ...requestOfAgent(record) },
      ...(share === undefined ? {} : { share: { first: share.first, count: share.count } }),
    };
    if (joined.length === 0) {
      const { isWarm, image, clones, failures } = await ports.forks.prepareClones(request);
      const named = acceptedFailures(context, clones.length, [...failures, ...unplaced(record, clones)], 'prepared');
      return { image, isWarm, clones, failures: named };
    }
    const { isPartialAllowed: _, fork: _fork, job: _job, ...question } = request;
    // The parent is reserved, so its devices and memory are those that will be forked.
    const inventory = await ports.forks.forkInventory(question);
    const origin = originOf(record.plan.host, inventory, record.plan.request.image ?? record.fork);
    const { fetch, dataSecurity } = record.plan.request;
    const hosts = [record.plan.host, ...joined.map(({ host }) => host)];
    const [root, others] = await Promise.all([
      ports.forks.prepareClones({ ...request, hosts }),
      onAllNeeded(context, 'prepareClones', joined, ({ host, forks, share: { first, count, disks } }) =>
        forks.prepareClones({
          ...{ ...request, vm: null, share: { first, count }, hosts },
          origin: {
            ...origin,
            ...(disks === undefined ? {} : { disks }),
            // The least there is: a host of an earlier build would not know the word.
            ...(dataSecurity === undefined || dataSecurity === 'none' ? {} : { dataSecurity }),
          },
          ...(fetch === undefined ? {} : { fetch }),
          ...fanoutOf(record, host),
        }),
      ),
    ]);
    return preparedOnHosts(context, root, others, new Set(origin.spec.nics.map(({ mac }) => mac)));
  },
  /** The root releases the parent first: it runs again, unprotected, before anything else is removed. */
  async undo(context) {
    const { record, ports } = context;
    const [root, joined] = await Promise.allSettled([ports.forks.discardFork(record.fork), discardJoined(context)]);
    for (const outcome of [root, joined]) if (outcome.status === 'rejected') throw outcome.reason;
  },
};

/** The part of the request that is the same on all hosts. */
function requestOfAgent({ plan }: ForkJobRecord) {
  const { hosts: _h, placement: _p, fetch: _f, transport: _t, sharedStorage: _s, ...others } = plan.request;
  const { fanout: _o, topology: _y, dataSecurity: _d, ...request } = others;
  return request;
}

/** Nothing for a host that gets the whole image from the root: an earlier build there would not know more. */
function fanoutOf({ plan: { fanout } }: ForkJobRecord, host: string) {
  const { levels, digestRelays } = fanout?.near.find((near) => near.host === host) ?? { levels: [], digestRelays: [] };
  if (fanout === undefined || (fanout.kind !== 'multicast' && levels.length === 0)) return {};
  const { near: _n, reason: _r, ...told } = fanout;
  return { fanout: { ...told, levels, digestRelays } };
}

function preparedOnHosts(
  context: ForkStepContext,
  root: PrepareForkReply,
  { done, failed }: Awaited<ReturnType<typeof onAllNeeded<PrepareForkReply>>>,
  parentMacs: ReadonlySet<string>,
) {
  const { record } = context;
  const clones = inOrder([...root.clones, ...done.flatMap(({ value }) => value.clones)]);
  const { leftOut, failures: ofHosts } = leaveOut(context, failed, clones);
  const ofClones = [...root.failures, ...done.flatMap(({ host: { host }, value }) => on(host, value.failures))];
  const failures = [...ofClones, ...ofHosts, ...unplaced(record, clones)];
  const isOnlyImage = record.plan.request.cloneCount === 0;
  const named = isOnlyImage ? [] : acceptedFailures(context, clones.length, failures, 'prepared');
  checkIdentities(clones, parentMacs);
  return { image: root.image, isWarm: false, clones, failures: inOrder(named), leftOut };
}

const on = (host: string, failures: readonly CloneFailure[]): CloneFailure[] =>
  failures.map((failure) => ({ ...failure, host }));

/** The clones for which no host had room when a partial fork was planned. */
export function unplaced({ plan }: ForkJobRecord, clones: readonly CloneIdentity[]): CloneFailure[] {
  const { shares, request, host } = plan;
  if (shares === undefined) return [];
  const placedCount = shares.reduce((sum, { count }) => sum + count, 0);
  const rest = { host, first: placedCount, count: request.cloneCount - placedCount };
  return failuresOf(rest, new MigrationError('OUT_OF_MEMORY', 'no host has room for it'), clones);
}

export const armParent: ForkExecutor = {
  async forward({ record, ports }) {
    await ports.forks.armParent(record.fork);
    return undefined;
  },
  undo: undoneWithClones,
};

export const connectHosts: ForkExecutor = {
  /** While the parent runs on: no host gets a page before the fork point. */
  async forward(context) {
    const { transport } = context.record.plan;
    if (transport === undefined) throw new MigrationError('INTERNAL', 'the plan does not say how hosts read the image');
    const { failed } = await onAllNeeded(context, 'connectHosts', joinedHosts(context), ({ forks }) =>
      forks.connectImage(context.record.fork, transport),
    );
    return withoutHosts(context, failed);
  },
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
  /** Each host that joins loads as soon as it has the state, in the same call. No host waits for another. */
  async forward(context) {
    const { record, ports, findings } = context;
    const [root, { done, failed }] = await Promise.all([
      ports.forks.loadClones(record.fork),
      onAllNeeded(context, 'loadClones', joinedHosts(context), ({ host }) =>
        ports.forks.sendForkState(record.fork, host),
      ),
    ]);
    const without = withoutHosts(context, failed);
    const failures = [...root.failures, ...done.flatMap(({ host: { host }, value }) => on(host, value.failures))];
    if (record.plan.request.cloneCount === 0) return without;
    const known = without?.failures ?? findings.failures;
    const failedIndexes = new Set([...known, ...failures].map(({ index }) => index));
    const loadedCount = findings.clones.filter(({ index }) => !failedIndexes.has(index)).length;
    const named = acceptedFailures(context, loadedCount, failures, 'loaded');
    return { ...without, failures: withOthers(known, named) };
  },
  undo: undoneWithClones,
};

/** The findings without the hosts that have failed, or undefined if none has. */
function withoutHosts(context: ForkStepContext, failed: Parameters<typeof leaveOut>[1]) {
  if (failed.length === 0) return undefined;
  const { clones, failures } = context.findings;
  const left = leaveOut(context, failed, clones);
  return { leftOut: left.leftOut, failures: withOthers(failures, left.failures) };
}

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

export function parentOf({ plan }: ForkJobRecord): string {
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

export function inJson(failures: readonly CloneFailure[]): CloneFailure[] {
  return failures.map((failure) => ({ ...failure, error: MigrationError.from(failure.error, AGENT).toJSON() }));
}

/** The steps of a fork after its commit. They are repeated until they succeed, and nothing undoes them. */
import { toMigrationError } from '../../domain/errors.js';
import { neverUndone } from '../walk.js';
import type { ForkExecutor, ForkFindings } from './context.js';
import { Filling } from './filling.js';
import { noteRun, runJoined, sinceRequestMs } from './go.js';
import { joinedHosts, onAll } from './hosts.js';
import { parentOf } from './steps.js';

/**
 * The fork is committed, so a clone that cannot run is only named. A host that does not answer keeps no other host from
 * its go: it is asked again while the images fill.
 */
export const runClones: ForkExecutor = {
  async forward(context) {
    const { record, ports, findings, marks, observer } = context;
    const beganMs = sinceRequestMs(context);
    const late = joinedHosts(context).filter(({ host }) => !findings.ran.includes(host));
    const [reply, { failed }] = await Promise.all([
      unlessForgotten(ports.forks.runClones(record.fork)),
      onAll(late, (host) => runJoined(context, host)),
    ]);
    for (const { host, error } of failed) observer.onWarning(`${host.host} has not let its clones run yet`, error);
    if (reply !== null) noteRun(context, reply, beganMs, null, null);
    else if (joinedHosts(context).length === 0) return undefined;
    const { ready, failures, ran, lost } = findings;
    return {
      // In a later life of the daemon only the agents had these. From here on the journal has them.
      ...(marks.startedAtMs === null ? beforeCommit(findings) : {}),
      ...{ ready, failures, ran, lost },
    };
  },
  undo: neverUndone,
};

export const fillImage: ForkExecutor = {
  forward: (context) => new Filling(context).untilComplete(),
  undo: neverUndone,
};

export const releaseParent: ForkExecutor = {
  /** The root ends last, because the others may still ask it. */
  async forward(context) {
    const { record, ports, findings, observer } = context;
    const { failed } = await onAll(joinedHosts(context), ({ forks }) => unlessForgotten(forks.finishFork(record.fork)));
    for (const { host, error } of failed) {
      if (!findings.lost.includes(host.host)) throw error;
      observer.onWarning(`${host.host}, which has lost its part of a fork, has not ended it`, error);
    }
    // An earlier attempt, whose answer was lost, may have finished the fork.
    await unlessForgotten(ports.forks.finishFork(record.fork));
    if (record.plan.request.vm !== null) await ports.parent.unreserve(parentOf(record), record.job);
    return undefined;
  },
  undo: neverUndone,
};

/**
 * Returns null if the agent has forgotten the fork. It does so only when the clones have run and the image is complete:
 * an earlier life of the daemon has finished the fork without journalling it.
 */
export async function unlessForgotten<T>(asking: Promise<T>): Promise<T | null> {
  try {
    return await asking;
  } catch (thrown) {
    if (toMigrationError(thrown).code === 'NOT_FOUND') return null;
    throw thrown;
  }
}

function beforeCommit(findings: ForkFindings): Partial<ForkFindings> {
  const { image, isWarm, clones, parentPauseMs, deviceStateBytes, leftOut } = findings;
  return { image, isWarm, clones, parentPauseMs, deviceStateBytes, leftOut };
}

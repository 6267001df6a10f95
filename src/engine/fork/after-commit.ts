/** The steps of a fork after its commit. They are repeated until they succeed, and nothing undoes them. */
import { MigrationError } from '../../domain/errors.js';
import { neverUndone } from '../walk.js';
import type { ForkExecutor, ForkFindings } from './context.js';
import { Filling } from './filling.js';
import { learnClones, noteFailures, noteRun, runJoined, sinceRequestMs, unlessForgotten } from './go.js';
import { joinedHosts, onAll, tellLeftOut } from './hosts.js';
import { parentOf, unplaced } from './steps.js';

/**
 * The fork is committed, so a clone that cannot run is only named. A host that does not answer keeps no other host from
 * its go: it is asked again while the images fill.
 */
export const runClones: ForkExecutor = {
  async forward(context) {
    const { record, ports, findings, observer } = context;
    const beganMs = sinceRequestMs(context);
    const late = joinedHosts(context).filter(({ host }) => !findings.ran.includes(host));
    const [reply, { failed }] = await Promise.all([
      unlessForgotten(ports.forks.runClones(record.fork)),
      onAll(late, (host) => runJoined(context, host)),
    ]);
    for (const { host, error } of failed) observer.onWarning(`${host.host} has not let its clones run yet`, error);
    if (reply !== null) {
      noteRun(context, reply, beganMs, null);
      await learnClones(context, ports.forks, reply);
    }
    noteFailures(context, unplaced(record, findings.clones));
    return soFar(findings);
  },
  undo: neverUndone,
};

export const fillImage: ForkExecutor = {
  forward: (context) => new Filling(context).untilComplete(),
  undo: neverUndone,
};

export const releaseParent: ForkExecutor = {
  /**
   * By now every host has committed or has lost its part, so a host that asks later has no part in the fork. The root
   * may have ended before (filling.ts).
   */
  async forward(context) {
    const { record, ports, findings, observer } = context;
    const [{ failed }] = await Promise.all([
      onAll(joinedHosts(context), ({ forks }) => unlessForgotten(forks.finishFork(record.fork))),
      tellLeftOut(context),
    ]);
    for (const { host, error } of failed) {
      if (!findings.lost.includes(host.host)) throw error;
      observer.onWarning(`${host.host}, which has lost its part of a fork, has not ended it`, error);
    }
    // An earlier attempt, whose answer was lost, may have finished the fork.
    await unlessForgotten(ports.forks.finishFork(record.fork));
    if (record.plan.request.vm !== null) await ports.parent.unreserve(parentOf(record), record.job);
    return undefined;
  },
  /** Of a lost fork only: the hosts that joined forget it as soon as they can. */
  async undo(context) {
    const { record } = context;
    const { failed } = await onAll(joinedHosts(context), ({ forks }) => unlessForgotten(forks.finishFork(record.fork)));
    const names = failed.map(({ host }) => host.host).join(', ');
    const cause = failed[0]?.error;
    if (cause !== undefined) {
      throw new MigrationError('STEP_FAILED', `${names}: the lost fork is not ended there yet`, { cause });
    }
  },
};

/**
 * What the report needs. The journal may lack the ends of the steps before the commit: nothing waits until they are
 * durable.
 */
function soFar(findings: ForkFindings): Partial<ForkFindings> {
  const { image, isWarm, clones, parentPauseMs, deviceStateBytes, leftOut, ready, failures, ran, lost } = findings;
  return { image, isWarm, clones, parentPauseMs, deviceStateBytes, leftOut, ready, failures, ran, lost };
}

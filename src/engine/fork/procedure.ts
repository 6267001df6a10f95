/**
 * The procedure of a fork, which walk.ts walks. Coordinator and agent are one daemon (D); P: QEMU of the parent, C: of
 * a clone.
 *
 * What the crash of each process costs while a step is under way. "Undone" means: the parent runs, unprotected, on its
 * own disks, and no clone, image or overlay of the fork is left. A parent that dies, dies as it would without a fork;
 * what is told of it here is what becomes of the fork.
 *
 *   step           pages of the image    D dies                  P dies       C dies       disk full
 *   -------------  --------------------  ----------------------  -----------  -----------  ----------------------
 *   reserveParent  parent's memory       undone at restart       undone       -            undone
 *   prepareClones  parent's memory       undone at restart       undone       undone (1)   undone
 *   armParent      parent's memory       undone at restart (2)   undone       undone (1)   undone
 *   forkPoint      parent's memory       undone at restart (3)   undone       undone (1)   undone
 *   startClones    image, rest parent's  undone at restart (2)   goes on (4)  undone (1)   undone
 *   commitFork     image, rest parent's  restart asks the        goes on (4)  goes on (5)  undone; unknown if the
 *                                        agent's record, and                               record cannot be read
 *                                        undoes or goes on
 *   fillImage      image, rest parent's  goes on at restart (2)  goes on (4)  goes on (5)  lost (6)
 *   releaseParent  image                 goes on at restart      nothing      nothing      tried again
 *
 *   (1) With --partial the fork goes on without it, and the report names it.
 *   (2) A write of the parent to a protected page, and a clone that touches a page which is not there, wait for the
 *       next daemon: the preload keeps the descriptors, so nobody reads a zero or writes past the image.
 *   (3) The parent stands still until then if it was stopped.
 *   (4) Its memory files stay until the image is complete: protected pages are as they were at the fork point, the
 *       others are copied already.
 *   (5) It is a VM that has ended.
 *   (6) As for any other reason why the image cannot be filled: its clones are ended, because they would wait for ever,
 *       and the parent runs on.
 *
 * The commit is one durable write of the agent. Which of the two is the case after a crash, `discardFork` decides: it
 * takes an uncommitted fork away, and is refused for a committed one.
 *
 * Journal: all steps up to the commit are announced together by the first of them, since one undo takes all of them
 * away; so between the request and the clones nothing is synced but the agent's own records.
 */

import { MigrationError } from '../../domain/errors.js';
import type { ForkReport, ForkStep, ForkStepName } from '../../domain/fork.js';
import { FORK_STEPS_AFTER_COMMIT, firstForkStepOutOfOrder } from '../../planner/fork/plan.js';
import { withDeadline } from '../deadline.js';
import { Walk } from '../walk.js';
import type { ForkFindings, ForkStepContext } from './context.js';
import { buildForkReport } from './report.js';
import {
  armParent,
  commitFork,
  fillImage,
  forkPoint,
  isForkCommitted,
  prepareClones,
  releaseParent,
  reserveParent,
  startClones,
} from './steps.js';

export const forkWalk = new Walk<ForkStepName, ForkStep, ForkStepContext, ForkFindings, ForkReport>({
  executors: {
    reserveParent,
    prepareClones,
    armParent,
    forkPoint,
    startClones,
    commitFork,
    fillImage,
    releaseParent,
  },
  commit: 'commitFork',
  awaitedBeforeUndo: new Set<ForkStepName>(['reserveParent']),
  durableBegins: new Set<ForkStepName>(),
  durableEnds: new Set<ForkStepName>(),
  firstStepOutOfOrder: firstForkStepOutOfOrder,
  isGrouped: ({ name }) => !FORK_STEPS_AFTER_COMMIT.includes(name),
  onAnnounced: () => undefined,
  localHost: ({ record }) => record.plan.host,
  isCommitted: isForkCommitted,
  unknownCommit({ record }, cause) {
    return new MigrationError(
      'NEEDS_RECOVERY',
      `it is not known whether the fork of ${record.plan.parent} took place`,
      {
        remedy: 'repair what the cause names, restart the daemon, then recover the job',
        cause,
      },
    );
  },
  recollect,
  releaseLost,
  report: buildForkReport,
});

/** A daemon that died right after the commit has taken the ends of the steps along. */
async function recollect({
  record,
  ports,
  limits,
  findings,
}: ForkStepContext): Promise<Partial<ForkFindings> | undefined> {
  if (findings.ready.length > 0) return undefined;
  const asking = ports.forks.forkProgress(record.fork);
  const { committed } = await withDeadline(ports.clock, asking, limits.callMsMax, 'asking what was committed');
  if (committed === null) return undefined;
  const { ready, ...found } = committed;
  const sinceRequestMs = (at: string): number => Math.max(0, Date.parse(at) - Date.parse(record.createdAt));
  return { ...found, ready: ready.map(({ index, at }) => ({ index, readyMs: sinceRequestMs(at) })) };
}

/** The image will never be complete: the host forgets the fork, and the parent at least is free again. */
async function releaseLost({ record, ports, limits, observer }: ForkStepContext): Promise<void> {
  const { vm } = record.plan.request;
  const calls: [string, () => Promise<void>][] = [['forgetting', () => ports.forks.finishFork(record.fork)]];
  if (vm !== null) calls.push(['unreserving the parent of', () => ports.parent.unreserve(vm, record.job)]);
  for (const [doing, call] of calls) {
    try {
      await withDeadline(ports.clock, call(), limits.callMsMax, `${doing} a lost fork`);
    } catch (error) {
      observer.onWarning(`${doing} a lost fork failed`, error);
    }
  }
}

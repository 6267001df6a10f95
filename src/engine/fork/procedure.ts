/**
 * The procedure of a fork, which walk.ts walks. The coordinator and the agent of the root are one daemon (D). P is the
 * QEMU of the parent, C that of a clone, on any host. The daemons of the hosts that join (L) have a table of their own
 * below.
 *
 * The table says what a crash of each process does to the fork while a step is under way. "Undone" means: the parent
 * runs, unprotected, on its own disks, and no clone, image or overlay of the fork is left. If the parent dies, that VM
 * is lost as it would be without a fork; the table then says what becomes of the fork.
 *
 *   step           pages of the image    D dies                 P dies        C dies        disk full
 *   -------------  --------------------  ---------------------  ------------  ------------  -----------------------
 *   reserveParent  parent's memory       undone at restart      undone        -             undone
 *   prepareClones  parent's memory       undone at restart      undone        undone (1)    undone
 *   armParent      parent's memory       undone at restart (2)  undone        undone (1)    undone
 *   connectHosts   parent's memory       undone at restart (2)  undone        undone (1)    undone
 *   forkPoint      parent's memory       undone at restart (3)  undone        undone (1)    undone
 *   loadClones     image, rest parent's  undone at restart (2)  continues(4)  undone (1)    undone
 *   commitFork     image, rest parent's  restart asks the       continues(4)  continues(5)  undone; unknown if the
 *                                        agent's record, and                                record cannot be read
 *                                        undoes or continues
 *   runClones      image, rest parent's  continues at           continues(4)  continues(5)  continues
 *                                        restart (2, 7)
 *   fillImage      image, rest parent's  continues at           continues(4)  continues(5)  lost (6)
 *                                        restart (2)
 *   releaseParent  image                 continues at restart   nothing       nothing       tried again
 *
 *   (1) With --partial the fork continues without this clone, and the report lists it.
 *   (2) A write of the parent to a protected page waits for the next daemon, and so does a clone that touches a missing
 *       page. The preload keeps the descriptors, so no clone reads a zero and no write changes the image.
 *   (3) If the parent was stopped it stays stopped until then.
 *   (4) The parent's memory files stay until the image is complete. Protected pages are as they were at the fork point,
 *       and the others have been copied already.
 *   (5) The clone is a VM that has ended, and the report lists it if it had not run. All clones or none holds until the
 *       commit.
 *   (6) This holds for every reason why the image cannot be filled: its clones are ended, because they would wait for
 *       ever, and the parent keeps running.
 *   (7) The clones that have not run wait, loaded and stopped. Neither the next daemon's start nor anything else lets
 *       them run before the job comes to runClones again. That call leaves alone what has run.
 *
 * A fork over hosts. L dies: the daemon of a host that joined, or the network to it. H dies: all of that host, with its
 * QEMUs and its part of the image. "Undone" is "without it" with --partial: the host is left out, and the report lists
 * its clones.
 *
 *   step           its pages             L dies                 H dies          disk of the host full
 *   -------------  --------------------  ---------------------  --------------  ---------------------
 *   reserveParent  -                     undone                 undone          undone
 *   prepareClones  none                  undone (8)             undone          undone
 *   armParent      none                  continues if it is     undone          continues
 *                                        back for its next
 *                                        call, or undone (8)
 *   connectHosts   none                  undone (8)             undone          continues
 *   forkPoint      none                  as in armParent        undone          continues
 *   loadClones     what its clones read  undone (8)             undone          continues
 *   commitFork     the same              continues              continues (9)   continues
 *   runClones      the same              continues (10)         continues (9)   continues (10)
 *   fillImage      image, rest root's    continues (10)         continues (11)  continues
 *   releaseParent  image                 tried again            continues (11)  tried again
 *
 *   If D dies, a host that joined is undone or continues with the root. Until D is back its clones wait: for the
 *   decision (8), for the go (10), or for pages that they touch.
 *   (8) The host keeps its clones over a restart of its daemon, and lets none run. It removes them when the coordinator
 *       says so, or when it asks the root (forkDecision) and hears `discarded`. A host that was left out, and that the
 *       coordinator cannot reach, hears that at the latest when the root has ended the fork.
 *   (9) Its clones have not run, and never will: the report lists them as soon as the host answers that it has no part
 *       of the fork (NOT_FOUND). The others run.
 *   (10) The others run. The job is `recovering` and names the host, tells it again to commit and to run, and does not
 *       end before it has answered.
 *   (11) Its clones that have run have ended with it. The report has them, as if they had ended by themselves.
 *
 * Fan-out. N dies: a near holder of a host L (its relay, or another receiver of the same multicast), or its daemon, or
 * the network between them. None of this changes what becomes of the fork: the root is the last resort of each page.
 *
 *   while              N dies                      D, the sender, dies         L dies
 *   -----------------  --------------------------  --------------------------  -------------------------------------
 *   L takes its seat   -                           L asks for a second, then   at its restart it asks anew, and gets
 *                                                  reads from N and the root   a seat with another number, or `over`
 *   the multicast runs -                           silent for a second: L      the others go on; at its restart it
 *                                                  reads from N and the root   reads from N and the root
 *   L reads from N     what was asked of N is      L reads from N; what N has  its readers read one level further
 *                      asked one level further,    not got either waits for D  up, at last from the root
 *                      at last of the root; L
 *                      connects to N again
 *
 * A host that joined commits after the root, in the call that lets its clones run, before the first of them runs. If it
 * refuses (CONFLICT), its `discardFork` says why, like that of the root: it is committed and gets its go again, or
 * nothing is left there and its clones have failed. If it dies in between, its record says that it is committed, its
 * clones are stopped, and the repeated call lets them run.
 *
 * The commit comes before the first instruction of any clone. So an undo never meets a clone that has run, and a clone
 * that runs is never taken back.
 *
 * A job that cannot go on after the commit is called needsRecovery, and is tried again until it ends (jobs/stalled.ts).
 *
 * The commit is one durable write of the agent. After a crash, `discardFork` decides whether it took place: the call
 * removes an uncommitted fork, and is refused for a committed one.
 *
 * Journal: the first step announces all steps until the clones run, because one undo removes all of them up to the
 * commit. So between the request and the clones only the agents' own records are synced. The ends of runClones and
 * fillImage are durable before the next step begins: when the agents have forgotten the fork, only they say which
 * clones there are, and that a host without a part has had its go.
 */

import { MigrationError } from '../../domain/errors.js';
import type { EarlierForkStepName, ForkReport, ForkStep, ForkStepName } from '../../domain/fork.js';
import { firstForkStepOutOfOrder, UNGROUPED_FORK_STEPS } from '../../planner/fork/plan.js';
import { withDeadline } from '../deadline.js';
import type { ForkPort } from '../ports/fork.js';
import { Walk } from '../walk.js';
import { fillImage, releaseParent, runClones } from './after-commit.js';
import type { ForkFindings, ForkStepContext } from './context.js';
import { inOrder, joinedHosts, onAll, withOthers } from './hosts.js';
import { buildForkReport } from './report.js';
import {
  armParent,
  commitFork,
  connectHosts,
  forkPoint,
  isForkCommitted,
  loadClones,
  prepareClones,
  reserveParent,
  startClones,
} from './steps.js';

type AnyForkStepName = ForkStepName | EarlierForkStepName;

export const forkWalk = new Walk<AnyForkStepName, ForkStep, ForkStepContext, ForkFindings, ForkReport>({
  executors: {
    reserveParent,
    prepareClones,
    armParent,
    connectHosts,
    forkPoint,
    startClones,
    loadClones,
    commitFork,
    runClones,
    fillImage,
    releaseParent,
  },
  commit: 'commitFork',
  awaitedBeforeUndo: new Set<AnyForkStepName>(['reserveParent']),
  // The agent forgets the fork in this step. From then on only the journal knows that it was committed.
  durableBegins: new Set<AnyForkStepName>(['releaseParent']),
  // The agents forget the fork in the last step. The journal alone then knows the clones, and who has had its go.
  durableEnds: new Set<AnyForkStepName>(['runClones', 'fillImage']),
  firstStepOutOfOrder: firstForkStepOutOfOrder,
  isGrouped: ({ name }) => !UNGROUPED_FORK_STEPS.includes(name),
  onAnnounced: () => undefined,
  localHost: ({ record }) => record.plan.host,
  isCommitted: isForkCommitted,
  unknownCommit({ record }, cause) {
    return new MigrationError(
      'NEEDS_RECOVERY',
      `it is not known whether the fork of ${record.plan.parent} was committed`,
      {
        remedy: 'repair the cause, and restart the daemon if the job does not go on by itself then',
        cause,
      },
    );
  },
  restoreFindings,
  releaseLost,
  report: buildForkReport,
});

/** Asks the agents for the findings, because a daemon that died right after the commit has not journalled them. */
async function restoreFindings(context: ForkStepContext): Promise<Partial<ForkFindings> | undefined> {
  const { record, ports, limits, findings } = context;
  if (findings.ready.length > 0) return undefined;
  const ask = ({ forks }: { readonly forks: ForkPort }) =>
    withDeadline(ports.clock, forks.forkProgress(record.fork), limits.callMsMax, 'asking what was committed');
  // A host that takes no part does not know the fork. One that does not answer is asked again when its clones run.
  const [own, { done }] = await Promise.all([ask(ports), onAll(joinedHosts(context), ask)]);
  const { committed } = own;
  if (committed === null) return undefined;
  const others = done.flatMap(({ host: { host }, value }) =>
    value.committed === null ? [] : [{ host, ...value.committed }],
  );
  const sinceRequestMs = (at: string): number => Math.max(0, Date.parse(at) - Date.parse(record.createdAt));
  const { image, isWarm, parentPauseMs, deviceStateBytes } = committed;
  const ready = [committed, ...others].flatMap((part) => part.ready);
  const ofOthers = others.flatMap(({ host, failures }) => failures.map((failure) => ({ ...failure, host })));
  return {
    ...{ image, isWarm, parentPauseMs, deviceStateBytes },
    clones: withOthers(
      findings.clones,
      [committed, ...others].flatMap((part) => part.clones),
    ),
    // The journal may know of hosts that were left out.
    failures: withOthers(findings.failures, [...committed.failures, ...ofOthers]),
    ready: inOrder(ready.map(({ index, at }) => ({ index, readyMs: sinceRequestMs(at) }))),
  };
}

/**
 * After an image that cannot be completed: the root forgets the fork, and the parent is no longer reserved. The hosts
 * that joined forget it when they have ended their clones.
 */
async function releaseLost(context: ForkStepContext): Promise<readonly AnyForkStepName[]> {
  const { record, ports, limits, observer } = context;
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
  return joinedHosts(context).length > 0 ? ['releaseParent'] : [];
}

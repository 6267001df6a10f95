/**
 * The procedure of a migration, which walk.ts walks.
 *
 * The table says which host holds the only good copy of the VM while a step is under way, and what the crash of each
 * process then costs. "Undone" means: the VM runs on the source again, and nothing is left on the target. SD and TD are
 * the daemons of source and target, SQ and TQ their QEMUs.
 *
 *   step           good copy        SD dies              TD dies          SQ dies      TQ dies      network cut
 *   -------------  ---------------  -------------------  ---------------  -----------  -----------  -----------------
 *   reserve        source, running  undone at restart    nothing          VM dies (1)  -            nothing
 *   prepareTarget  source, running  undone at restart    undone (2)       VM dies (1)  undone       undone (2)
 *   exposeSource   source, running  undone at restart    undone (2)       VM dies (1)  undone       undone (2)
 *   connectTarget  source, running  undone at restart    undone (2)       VM dies (1)  undone       undone (2)
 *   push           source, running  undone at restart    undone (2)       VM dies (1)  undone       undone (2)
 *   nativeStart    source, running  undone at restart    undone (2)       VM dies (1)  undone       undone (2)
 *   stopSource     source, stopped  stopped till restart undone (2)       VM dies (1)  undone       undone (2)
 *   pushLast       source, stopped  stopped till restart undone (2)       VM dies (1)  undone       undone (2)
 *   transferState  source, stopped  stopped till restart undone (2)       VM dies (1)  undone       undone (2)
 *   nativeSwitch.  source, stopped  stopped till restart undone (2)       VM dies (1)  undone       undone (2)
 *   commit         both, stopped    restart asks the     waits for TD     nothing (3)  VM lost (4)  waits for network
 *                                   registry; undoes
 *                                   or continues
 *   resumeTarget   both, until the  continues at         waits for TD     nothing (3)  VM lost (4)  waits for network
 *                  VM runs          restart
 *   drain          target's pages,  missing pages wait   missing pages    nothing (3)  VM lost      missing pages wait
 *                  source's rest    for SD (6)           wait for TD (7)  (5)                       for network (6)
 *   verifyMemory   target, running  continues at         waits for TD     nothing (3)  VM dies (1)  waits for network
 *                  (8)              restart
 *   releaseSource  target, running  continues at         continues at     nothing      VM dies (1)  continues later
 *                                   restart              restart
 *
 *   A lost or restored owner record changes one thing: the restart of SD first asks TD whether it runs the VM, and the
 *   VM stays stopped until TD answers (is-committed.ts).
 *
 *   (1) The VM dies as it would without a migration.
 *   (2) The VM runs again at once. What is left on a target that does not answer is journalled as a leftover, and
 *       cleaned up when the target answers.
 *   (3) The daemon serves the frozen memory from files and does not need QEMU. An exception is a copy-on-write clone:
 *       the pages it has written are copied to a file within some tenths of a second after the commit. If its QEMU dies
 *       before that, the VM is lost.
 *   (4) The source keeps the stopped VM, complete, but never resumes it by itself: only a person can know that the
 *       target will not run it. If a user has ended the VM there by force, the source frees it.
 *   (5) Native post-copy: the VM is lost.
 *   (6) Native post-copy: its stream goes through both daemons. QEMU pauses on both hosts, and is connected again.
 *   (7) Native post-copy: as (6), but for a TQ whose main loop waits for a page. It takes no new connection to its
 *       monitor, by which it would be told to wait for the stream again, so the VM is lost.
 *   (8) Until it is proven, the source's frozen memory is the one that is certain. If it differs, the VM is stopped on
 *       the target, the job is lost, and the source keeps its part for the user.
 *
 * "Waits" and "continues" after the commit have no end: when nothing has advanced for long the job is called
 * needsRecovery, and is tried again until it ends as done or lost (jobs/stalled.ts).
 *
 * Journal: the steps of the blackout are announced together before the VM is stopped, and their ends are written when
 * the VM runs again. So there is one fsync inside the blackout on this host (the target makes its own): that of the
 * compare-and-swap in the registry. Only the registry decides what a restarted daemon does with a job.
 */

import { MigrationError } from '../../domain/errors.js';
import type { MigrationReport, PlanStep, StepName } from '../../domain/migration.js';
import { firstStepOutOfOrder } from '../../planner/migration/plan.js';
import { withDeadline } from '../deadline.js';
import { Walk } from '../walk.js';
import type { Findings, StepContext } from './context.js';
import { fetchRest, releaseSource } from './fetch.js';
import { isCommitted } from './is-committed.js';
import { wasForced } from './lost.js';
import { nativeStart, nativeSwitchover } from './native.js';
import { connectTarget, exposeSource, prepareTarget, reserve } from './prepare.js';
import { push } from './push.js';
import { pushLast } from './push-last.js';
import { buildReport } from './report.js';
import { commit, resumeTarget, stopSource, transferState } from './switchover.js';
import { verifyMemory } from './verify.js';

export const migrationWalk = new Walk<StepName, PlanStep, StepContext, Findings, MigrationReport>({
  executors: {
    reserve,
    prepareTarget,
    exposeSource,
    connectTarget,
    push,
    stopSource,
    pushLast,
    transferState,
    commit,
    resumeTarget,
    // 'drain' is the step's name in plans, journals and the API, and stays: journals of earlier builds hold it.
    drain: fetchRest,
    verifyMemory,
    releaseSource,
    nativeStart,
    nativeSwitchover,
  },
  commit: 'commit',
  awaitedBeforeUndo: new Set<StepName>(['reserve', 'exposeSource', 'stopSource']),
  // The release destroys the source's memory.
  durableBegins: new Set<StepName>(['releaseSource']),
  durableEnds: new Set<StepName>(['drain', 'verifyMemory']),
  firstStepOutOfOrder,
  isGrouped: (step) => step.isInBlackout,
  onAnnounced({ findings }, step, at) {
    if (step.isInBlackout) findings.stoppedAt = at;
  },
  localHost: ({ record }) => record.plan.source,
  isCommitted,
  unknownCommit({ record }, cause) {
    const { vm, target } = record.plan.request;
    return new MigrationError('NEEDS_RECOVERY', `it is not known whether ${vm} now belongs to ${target}`, {
      remedy:
        'the VM stays stopped here until that is known: connect the hosts, or repair what the cause names; ' +
        'the job goes on by itself then',
      cause,
    });
  },
  restoreFindings: () => Promise.resolve(undefined),
  releaseLost,
  report: buildReport,
});

/**
 * Ends the source's part of a lost migration. The source keeps the memory for its user until `stop` frees it, except if
 * a user has ended the VM by force on the target: then nobody wants it any more. The target's part ends with the undo
 * of resumeTarget, when the end of the job is durable. Until then the target must be able to say again what happened.
 */
async function releaseLost(context: StepContext, error: MigrationError): Promise<readonly StepName[]> {
  const { record, ports, limits, observer } = context;
  const { vm } = record.plan.request;
  const calls: [string, () => Promise<void>][] = [
    ['unexposing', () => ports.source.unexpose(record.session)],
    ['unreserving', () => ports.source.unreserve(vm, record.job)],
  ];
  if (wasForced(error)) calls.push(['releasing', () => ports.source.release(vm, record.session)]);
  for (const [doing, call] of calls) {
    try {
      await withDeadline(ports.clock, call(), limits.callMsMax, `${doing} ${vm}`);
    } catch (failure) {
      observer.onWarning(`${doing} a lost VM failed`, failure);
    }
  }
  return ['resumeTarget'];
}

/**
 * The procedure of a migration, which walk.ts walks.
 *
 * Who holds the only good copy of the VM while a step is under way, and what the crash of each process then costs.
 * "Undone" means: the VM runs on the source again and nothing is left on the target. SD, TD: daemon of source, target;
 * SQ, TQ: their QEMU.
 *
 *   step           good copy           SD dies             TD dies       SQ dies       TQ dies      network cut
 *   -------------  ------------------  ------------------  ------------  ------------  -----------  -------------
 *   reserve        source, running     undone at restart   nothing       VM dies (1)   -            nothing
 *   prepareTarget  source, running     undone at restart   undone (2)    VM dies (1)   undone       undone (2)
 *   exposeSource   source, running     undone at restart   undone (2)    VM dies (1)   undone       undone (2)
 *   connectTarget  source, running     undone at restart   undone (2)    VM dies (1)   undone       undone (2)
 *   nativeStart    source, running     undone at restart   undone (2)    VM dies (1)   undone       undone (2)
 *   stopSource     source, stopped     stopped until       undone (2)    VM dies (1)   undone       undone (2)
 *                                      restart
 *   transferState  source, stopped     stopped until       undone (2)    VM dies (1)   undone       undone (2)
 *                                      restart
 *   nativeSwitch.  source, stopped     stopped until       undone (2)    VM dies (1)   undone       undone (2)
 *                                      restart
 *   commit         both, stopped       restart asks the    waits for TD  nothing (3)   VM lost (4)  waits
 *                                      registry; undoes
 *                                      or goes on
 *   resumeTarget   both until it runs  goes on at restart  waits for TD  nothing (3)   VM lost (4)  waits
 *   drain          target's pages,     missing pages       all missing   nothing (3);  VM lost      missing pages
 *                  source's rest       wait for SD         pages wait    native: VM                 wait (5)
 *                                                          for TD        lost
 *   releaseSource  target, running     goes on at restart  goes on at    nothing       VM dies (1)  goes on later
 *                                                          restart
 *
 *   (1) As it would without a migration.
 *   (2) The VM runs again at once; what is left on a target that does not answer is journalled as a leftover and
 *       cleaned up when it answers.
 *   (3) The frozen memory is in files that the daemon serves; QEMU is not needed for it. What a copy-on-write clone has
 *       written gets there some tenths of a second after the commit: VM lost, if its QEMU dies before.
 *   (4) The source keeps the stopped VM, complete, but never resumes it by itself: only a person can know that the
 *       target will not run it.
 *   (5) Native post-copy: QEMU pauses; needs a person.
 *
 * Journal: the steps of the blackout are announced together, before the VM is stopped, and their ends are written when
 * the VM runs again: so the one fsync inside the blackout (here; the target makes its own) is the compare-and-swap in
 * the registry, which alone decides what a restarted daemon does with a job.
 */

import { MigrationError } from '../../domain/errors.js';
import type { MigrationReport, PlanStep, StepName } from '../../domain/migration.js';
import { firstStepOutOfOrder } from '../../planner/migration/plan.js';
import { withDeadline } from '../deadline.js';
import { Walk } from '../walk.js';
import type { Findings, StepContext } from './context.js';
import { fetchRest, releaseSource } from './fetch.js';
import { nativeStart, nativeSwitchover } from './native.js';
import { connectTarget, exposeSource, prepareTarget, reserve } from './prepare.js';
import { buildReport } from './report.js';
import { commit, isCommitted, resumeTarget, stopSource, transferState } from './switchover.js';

export const migrationWalk = new Walk<StepName, PlanStep, StepContext, Findings, MigrationReport>({
  executors: {
    reserve,
    prepareTarget,
    exposeSource,
    connectTarget,
    stopSource,
    transferState,
    commit,
    resumeTarget,
    // 'drain' is the step's name in plans, journals and the API, and stays: journals of earlier builds hold it.
    drain: fetchRest,
    releaseSource,
    nativeStart,
    nativeSwitchover,
  },
  commit: 'commit',
  awaitedBeforeUndo: new Set<StepName>(['reserve', 'exposeSource', 'stopSource']),
  // Release destroys the source's memory.
  durableBegins: new Set<StepName>(['releaseSource']),
  durableEnds: new Set<StepName>(['drain']),
  firstStepOutOfOrder,
  isGrouped: (step) => step.isInBlackout,
  onAnnounced({ findings }, step, at) {
    if (step.isInBlackout) findings.stoppedAt = at;
  },
  localHost: ({ record }) => record.plan.source,
  isCommitted,
  unknownCommit({ record }, cause) {
    const { vm, target } = record.plan.request;
    return new MigrationError('NEEDS_RECOVERY', `it is not known whether ${vm} belongs to ${target} now`, {
      remedy:
        'the VM is stopped and complete on both hosts; repair the registry, restart the daemon, then recover the job',
      cause,
    });
  },
  recollect: () => Promise.resolve(undefined),
  releaseLost,
  report: buildReport,
});

/** Nobody fetches from the source any more, and what it keeps is its user's: `stop` frees it. */
async function releaseLost({ record, ports, limits, observer }: StepContext): Promise<void> {
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

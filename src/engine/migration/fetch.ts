/**
 * The steps after the commit: the target runs and fetches the missing pages. Nothing here is undone. This daemon or a
 * later one may repeat every call.
 */

import { raised } from '../../domain/data-security.js';
import { MigrationError, NETWORK_CODES, toMigrationError } from '../../domain/errors.js';
import { MODE_TRAITS } from '../../domain/migration.js';
import { Rate } from '../../kit/rate.js';
import { pause, withDeadline } from '../deadline.js';
import { PollPace } from '../poll.js';
import type { SessionProgress } from '../ports/session.js';
import { describeProgress, troubleOf } from '../progress.js';
import { neverUndone } from '../walk.js';
import { noteAdvance, reportTrouble } from '../walk-context.js';
import type { Findings, StepContext, StepExecutor } from './context.js';
import { isCommitted } from './is-committed.js';
import { guestEndOf, lost } from './lost.js';
import { fetchRestNatively } from './native.js';

const CONNECTION_REMEDY = 'repair the connection between the hosts';

export const fetchRest: StepExecutor = {
  async forward(context) {
    const { mover } = MODE_TRAITS[context.record.plan.request.mode];
    return mover === 'backend' ? fetchRestNatively(context) : fetchPages(context);
  },
  undo: neverUndone,
};

async function fetchPages(
  context: StepContext,
): Promise<Pick<Findings, 'targetCounters' | 'pageBytes'> & Partial<Pick<Findings, 'guestEnd'>>> {
  const { ports, limits, marks, halt, observer } = context;
  const pace = new PollPace(limits);
  const rate = new Rate();
  for (;;) {
    const progress = await ask(context);
    const guestEnd = guestEndOf(progress);
    if (guestEnd !== null) return { targetCounters: progress.counters, pageBytes: progress.pageBytes, guestEnd };
    const nowMs = ports.clock.nowMs();
    noteAdvance(context, progress.pagesPresent, nowMs);
    rate.note(nowMs, bytesFetched(progress));
    const described = describeProgress({
      ...progress,
      pagesDone: progress.pagesPresent,
      bytesDone: bytesFetched(progress),
      bytesPerS: rate.bytesPerS,
      faultCount: progress.counters.faultCount ?? 0,
    });
    observer.onProgress(described);
    if (progress.state === 'complete') return { targetCounters: progress.counters, pageBytes: progress.pageBytes };
    if (!progress.hasRun) {
      const resuming = ports.target.resume(context.record.session, context.record.epoch + 1);
      await withDeadline(ports.clock, resuming, limits.callMsMax, 'resuming the target again');
    } else if (progress.state === 'disconnected' || progress.state === 'failed') {
      const trouble = troubleInState(progress.state, context, progress);
      // A reopened session does not know why the previous one failed, so an earlier cause is kept.
      if (trouble.cause !== undefined || marks.trouble === null) marks.trouble = trouble;
      reportTrouble(context, trouble);
      await reconnect(context);
    } else {
      reportTrouble(context, null);
    }
    if (nowMs - marks.advancedAtMs > limits.recoveryMsMax) {
      throw standstill(`no page has arrived for ${limits.recoveryMsMax} ms`, marks.trouble);
    }
    await pause(ports.clock, pace.nextMs(described.secondsLeft), halt);
  }
}

async function ask(context: StepContext): Promise<SessionProgress> {
  const { ports, limits, record } = context;
  const call = ports.target.progress(record.session);
  const progress = await withDeadline(ports.clock, call, limits.callMsMax, 'asking the target for progress');
  if (progress.state === 'gone' && guestEndOf(progress) === null)
    throw lost(context, progress.hasRun, troubleOf(progress, 'the target'));
  return progress;
}

/** Describes the trouble. A failed session gives its own reason; the connection of the hosts may be good. */
function troubleInState(
  state: 'disconnected' | 'failed',
  { record }: StepContext,
  progress: SessionProgress,
): MigrationError {
  const cause = troubleOf(progress, 'the target');
  if (state === 'disconnected') {
    return new MigrationError('DISCONNECTED', `${record.plan.request.target} has lost its data connection`, { cause });
  }
  const code = cause?.code ?? 'NATIVE_FAILED';
  return new MigrationError(code, `the target's page session failed: ${code}`, {
    ...(cause?.remedy === undefined ? {} : { remedy: cause.remedy }),
    cause,
  });
}

/** Builds the error for missing progress. Without a known trouble, a bad connection is the most likely reason. */
function standstill(message: string, trouble: MigrationError | null): MigrationError {
  const isNetwork = trouble === null || NETWORK_CODES.has(trouble.code);
  const remedy = isNetwork ? CONNECTION_REMEDY : (trouble.remedy ?? 'repair the cause');
  return new MigrationError('NEEDS_RECOVERY', message, { remedy, ...(trouble === null ? {} : { cause: trouble }) });
}

/**
 * Connects the target again. The keys of an earlier life of the source's daemon are invalid, so the source is asked for
 * them each time: `expose` is idempotent and returns the current ones.
 */
async function reconnect(context: StepContext): Promise<void> {
  const { ports, limits, record } = context;
  const { vm, transport, target, dataSecurity } = record.plan.request;
  try {
    const exposing = ports.source.expose({ session: record.session, vm, token: record.token, transport, target });
    context.endpoint = await withDeadline(ports.clock, exposing, limits.callMsMax, 'exposing the source again');
    const connecting = ports.target.reconnect(record.session, raised(context.endpoint, dataSecurity));
    await withDeadline(ports.clock, connecting, limits.callMsMax, 'connecting the target again');
  } catch (thrown) {
    const error = toMigrationError(thrown);
    // The source knows that the pages do not exist any more.
    if (error.code === 'VM_LOST') throw error;
    const remedy = error.remedy ?? (NETWORK_CODES.has(error.code) ? CONNECTION_REMEDY : undefined);
    throw new MigrationError(error.code, `the target cannot connect again: ${error.message}`, {
      ...(remedy === undefined ? {} : { remedy }),
      isRetryable: true,
      cause: error,
    });
  }
}

export const releaseSource: StepExecutor = {
  async forward(context) {
    const { record, ports, limits, observer, findings } = context;
    const { vm } = record.plan.request;
    // A lost or restored owner record is put right first: the source releases only a VM that has left.
    await isCommitted(context, 'proven');
    const owner = await ports.registry.owner(vm);
    // If another session owns the VM, it has come back since. Then an earlier attempt of this step has succeeded, and
    // the VM must not be released again.
    if (owner === null || owner.session === record.session) {
      try {
        const counting = ports.source.sourceCounters(record.session);
        const counters = await withDeadline(ports.clock, counting, limits.callMsMax, "reading the source's counters");
        // The counters are kept at once: a repetition of this step finds the session released and its counters gone.
        if (Object.keys(counters).length > 0) findings.sourceCounters = counters;
      } catch (error) {
        observer.onWarning('the report lacks the counters of the source', error);
      }
      await passOnExitCode(context);
      await ports.source.release(vm, record.session);
    }
    await ports.target.finish(record.session).catch(ignoreNotFound);
    return { sourceCounters: findings.sourceCounters };
  },
  undo: neverUndone,
};

/** Passes the guest's exit code to the target, because the release deletes the source's record. */
async function passOnExitCode({ record, ports, limits, findings }: StepContext): Promise<void> {
  const looking = ports.sourceInventory.vmInventory(record.plan.request.vm).catch((thrown: unknown) => {
    // An earlier attempt, whose answer was lost, has released the VM.
    if (toMigrationError(thrown).code === 'NOT_FOUND') return { exitCode: null };
    throw thrown;
  });
  const { exitCode } = await withDeadline(ports.clock, looking, limits.callMsMax, 'asking for the exit code');
  if (exitCode === null) return;
  await ports.target.inherit(record.session, { exitCode }).catch(ignoreNotFound);
  // A guest that has written its code before the move, and has ended after it, has ended with that code.
  if (findings.guestEnd === null) return;
  const asking = ports.target.progress(record.session);
  const progress = await withDeadline(ports.clock, asking, limits.callMsMax, 'asking how the guest has ended');
  findings.guestEnd = guestEndOf(progress) ?? findings.guestEnd;
}

/** Ignores NOT_FOUND: an earlier attempt, whose answer was lost, has finished the target's session. */
function ignoreNotFound(thrown: unknown): void {
  const error = toMigrationError(thrown);
  if (error.code !== 'NOT_FOUND') throw error;
}

function bytesFetched({ counters, pagesPresent, pageBytes }: SessionProgress): number {
  const { demandBytes, prefetchBytes, pushBytes = 0 } = counters;
  return demandBytes === undefined || prefetchBytes === undefined
    ? pagesPresent * pageBytes
    : demandBytes + prefetchBytes + pushBytes;
}

/**
 * Fetches memory while the VM still runs on the source, and again what the VM has written meanwhile: in a hybrid as
 * long as that gets less, in a pre-copy until the rest can be fetched in the downtime that the request allows. What is
 * still missing then is fetched after the switchover, as in a post-copy, or before it (push-last.ts).
 *
 * Each round of written pages is taken back on the target before anything else is fetched, and before the stop, because
 * no later round tells of them again. If an answer is lost, nobody knows which round has been taken. So no call of a
 * round is repeated: the step fails, and the whole move is undone.
 */
import { MigrationError } from '../../domain/errors.js';
import { bringsAllFirst } from '../../domain/migration.js';
import { Rate } from '../../kit/rate.js';
import { describeBytes } from '../../planner/bytes.js';
import { nextPrecopyMove, type Standstill } from '../../planner/migration/downtime.js';
import { nextRound, type Pass, type PushTrace } from '../../planner/migration/rounds.js';
import { pause, withDeadline } from '../deadline.js';
import type { SessionProgress } from '../ports/session.js';
import { describeProgress, troubleOf } from '../progress.js';
import { newMarks, noteAdvance } from '../walk-context.js';
import type { StepContext, StepExecutor } from './context.js';

/** To read which pages were written takes a second for some hundred GiB of memory. */
const ROUND_MS_MAX = 30_000;

export const push: StepExecutor = {
  async forward(context) {
    const { ports, record } = context;
    const { vm } = record.plan.request;
    const rate = new Rate();
    const passes: Pass[] = [];
    const dirtyBytes: number[] = [];
    let pushed = 0;
    for (;;) {
      const beganAtMs = ports.clock.nowMs();
      const progress = await fetchAll(context, rate);
      const bytes = pushedBytes(progress) - pushed;
      passes.push({ bytes, ms: ports.clock.nowMs() - beganAtMs });
      pushed += bytes;
      const noting = ports.source.noteDirty(vm, record.session);
      const { round, dirtyPages } = await inTime(context, noting, `noting what ${vm} has written`);
      const taking = ports.target.takeBack(record.session, round);
      await inTime(context, taking, `giving up what ${vm} has written`);
      dirtyBytes.push(dirtyPages * progress.pageBytes);
      if (isEnough(context, { passes, dirtyBytes }, progress.pageBytes)) return { rounds: round };
    }
  },
  async undo() {
    // The undo of prepareTarget discards what has been fetched; that of exposeSource ends the tracking of writes.
  },
};

/** Whether to stop the VM now. Throws DOWNTIME_TOO_LONG if it writes too fast for a pre-copy. */
function isEnough(context: StepContext, trace: PushTrace, pageBytes: number): boolean {
  const { request, memoryBytes } = context.record.plan;
  if (!bringsAllFirst(request.mode)) return nextRound(trace) === 'switch';
  const move = nextPrecopyMove(trace, { downtimeMsMax: request.downtimeMsMax, memoryBytes });
  if (move.kind === 'giveUp') throw tooFast(context, trace.dirtyBytes.length, move.best);
  if (move.kind === 'push') return false;
  context.left = { bytes: trace.dirtyBytes.at(-1) ?? 0, fetchedBytesPerS: move.fetchedBytesPerS, pageBytes };
  return true;
}

function tooFast({ record }: StepContext, rounds: number, best: Standstill): MigrationError {
  const { vm, downtimeMsMax } = record.plan.request;
  const { neededMs, writtenBytesPerS, fetchedBytesPerS } = best;
  const rates = `it writes ${describeBytes(writtenBytesPerS)}/s, and ${describeBytes(fetchedBytesPerS)}/s arrive`;
  const message = `${vm} would stand still for about ${neededMs} ms, not ${downtimeMsMax}, after ${rounds} rounds`;
  return new MigrationError('DOWNTIME_TOO_LONG', `${message}: ${rates}`, {
    remedy: `use --hybrid or --postcopy, or --max-downtime ${neededMs}`,
    details: { downtimeMsMax, rounds, ...best },
  });
}

function inTime<T>({ ports, cancel }: StepContext, work: Promise<T>, what: string): Promise<T> {
  return withDeadline(ports.clock, work, ROUND_MS_MAX, what, cancel);
}

/** Fetches every missing page. Returns the last reading. Throws if no page arrives for long. */
async function fetchAll(context: StepContext, rate: Rate): Promise<SessionProgress> {
  const { ports, limits, record, cancel, observer } = context;
  const marks = newMarks(null, ports.clock.nowMs());
  for (;;) {
    const fetching = ports.target.fetchAhead(record.session);
    const what = 'fetching pages while the VM runs';
    const { isDone } = await withDeadline(ports.clock, fetching, limits.callMsMax, what, cancel);
    const asking = ports.target.progress(record.session);
    const progress = await withDeadline(
      ports.clock,
      asking,
      limits.callMsMax,
      'asking the target for progress',
      cancel,
    );
    refuseBroken(progress);
    const nowMs = ports.clock.nowMs();
    noteAdvance({ marks }, progress.pagesPresent, nowMs);
    rate.note(nowMs, pushedBytes(progress));
    observer.onProgress(
      describeProgress({
        ...progress,
        pagesDone: progress.pagesPresent,
        bytesDone: pushedBytes(progress),
        bytesPerS: rate.bytesPerS,
        faultCount: 0,
      }),
    );
    if (isDone) return progress;
    if (nowMs - marks.advancedAtMs > limits.pushQuietMsMax) throw standstill(limits.pushQuietMsMax, progress);
    await pause(ports.clock, limits.pollMs, cancel);
  }
}

function refuseBroken(progress: SessionProgress): void {
  if (progress.state !== 'gone' && progress.state !== 'failed') return;
  const cause = troubleOf(progress, 'the target');
  const code = cause?.code ?? (progress.state === 'gone' ? 'QEMU_GONE' : 'NATIVE_FAILED');
  throw new MigrationError(code, 'the target cannot fetch pages any more', cause === undefined ? {} : { cause });
}

function standstill(quietMs: number, progress: SessionProgress): MigrationError {
  const cause = troubleOf(progress, 'the target');
  const code = progress.state === 'disconnected' ? 'DISCONNECTED' : 'TIMEOUT';
  return new MigrationError(code, `no page has arrived for ${quietMs} ms`, {
    remedy: 'repair the connection between the hosts, or move the VM with --postcopy',
    ...(cause === undefined ? {} : { cause }),
  });
}

function pushedBytes({ counters }: SessionProgress): number {
  return counters.pushBytes ?? 0;
}

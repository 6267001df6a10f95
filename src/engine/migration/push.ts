/**
 * Fetches memory while the VM still runs on the source, and again what the VM has written meanwhile, as long as that
 * gets less. What is still missing then is fetched after the switchover, as in a post-copy.
 *
 * Each round of written pages is taken back on the target before anything else is fetched, and before the stop, because
 * no later round tells of them again. If an answer is lost, nobody knows which round has been taken. So no call of a
 * round is repeated: the step fails, and the whole move is undone.
 */
import { MigrationError } from '../../domain/errors.js';
import { Rate } from '../../kit/rate.js';
import { nextRound } from '../../planner/migration/rounds.js';
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
    const first = await fetchAll(context, rate);
    const trace = { firstPassBytes: pushedBytes(first), rounds: [] as { dirtyBytes: number }[] };
    for (;;) {
      const noting = ports.source.noteDirty(vm, record.session);
      const { round, dirtyPages } = await inTime(context, noting, `noting what ${vm} has written`);
      const taking = ports.target.takeBack(record.session, round);
      await inTime(context, taking, `giving up what ${vm} has written`);
      trace.rounds.push({ dirtyBytes: dirtyPages * first.pageBytes });
      if (nextRound(trace) === 'switch') return { rounds: round };
      await fetchAll(context, rate);
    }
  },
  async undo() {
    // The undo of prepareTarget discards what has been fetched; that of exposeSource ends the tracking of writes.
  },
};

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

/**
 * Fetches memory while the VM still runs on the source, and again what the VM has written meanwhile. A hybrid goes on
 * while that pays; what is still missing then is fetched after the switchover, as in a post-copy. A pre-copy goes on
 * until the rest can be fetched in the downtime that the request allows (push-last.ts).
 *
 * Each round of written pages is taken back on the target before anything else is fetched, and before the stop, because
 * no later round tells of them again. If an answer is lost, nobody knows which round has been taken. So no call of a
 * round is repeated: the step fails, and the whole move is undone.
 */
import { MigrationError } from '../../domain/errors.js';
import { bringsAllFirst } from '../../domain/migration.js';
import { Rate } from '../../kit/rate.js';
import { describeBytes } from '../../planner/bytes.js';
import { nextPrecopyMove, type Pass, type Standstill } from '../../planner/migration/downtime.js';
import { nextRound, nextRoundMs, type Round } from '../../planner/migration/rounds.js';
import { pause, withDeadline } from '../deadline.js';
import type { DirtyRound, SessionProgress } from '../ports/session.js';
import { type FetchedAhead, HOLD_MS_MAX } from '../ports/target.js';
import { describeProgress, troubleOf } from '../progress.js';
import { type Marks, newMarks, noteAdvance } from '../walk-context.js';
import type { StepContext, StepExecutor } from './context.js';

/** To read which pages were written takes a second for some hundred GiB of memory. */
const NOTING_MS_MAX = 30_000;
/** A pre-copy shows its progress so often. */
const LOOK_MS = 1_000;

export const push: StepExecutor = {
  async forward(context) {
    const isPrecopy = bringsAllFirst(context.record.plan.request.mode);
    return { rounds: await (isPrecopy ? pushUntilRestFits(context) : pushWhilePaying(context)) };
  },
  async undo() {
    // The undo of prepareTarget discards what has been fetched; that of exposeSource ends the tracking of writes.
  },
};

/** Returns the number of rounds. */
async function pushWhilePaying(context: StepContext): Promise<number> {
  const { clock } = context.ports;
  const fetching = new Fetching(context);
  const rounds: Round[] = [];
  for (;;) {
    const beganAtMs = clock.nowMs();
    const roundMs = nextRoundMs(rounds);
    const { bytes, isDone, progress } = await fetching.for(roundMs);
    const fetchedMs = Math.min(roundMs, clock.nowMs() - beganAtMs);
    const { round, takenPages, dirtyPages, againPages } = await noteWritten(context);
    const { pageBytes } = progress;
    rounds.push({
      fetchedBytes: bytes,
      takenBackBytes: takenPages * pageBytes,
      writtenBytes: dirtyPages * pageBytes,
      writtenAgainBytes: againPages * pageBytes,
      isAll: isDone,
      idleMs: clock.nowMs() - beganAtMs - fetchedMs,
    });
    const usedPages = progress.pagesTotal - (progress.counters.pagesZero ?? 0);
    if (nextRound(rounds, usedPages * pageBytes) === 'switch') return round;
  }
}

/** Returns the number of rounds. Throws DOWNTIME_TOO_LONG if the VM writes too fast. */
async function pushUntilRestFits(context: StepContext): Promise<number> {
  const { request, memoryBytes } = context.record.plan;
  const { downtimeMsMax } = request;
  const fetching = new Fetching(context);
  const passes: Pass[] = [];
  const dirtyBytes: number[] = [];
  for (;;) {
    const beganAtMs = context.ports.clock.nowMs();
    const { bytes, progress } = await fetching.all();
    passes.push({ bytes, ms: context.ports.clock.nowMs() - beganAtMs });
    const { round, dirtyPages } = await noteWritten(context);
    const leftBytes = dirtyPages * progress.pageBytes;
    dirtyBytes.push(leftBytes);
    const move = nextPrecopyMove({ passes, dirtyBytes }, { downtimeMsMax, memoryBytes });
    if (move.kind === 'giveUp') throw tooFast(context, round, move.best);
    if (move.kind === 'push') continue;
    context.left = { bytes: leftBytes, fetchedBytesPerS: move.fetchedBytesPerS, pageBytes: progress.pageBytes };
    return round;
  }
}

/** Makes a round: what the VM has written since the one before is missing again. */
async function noteWritten(context: StepContext): Promise<DirtyRound & { readonly takenPages: number }> {
  const { ports, record, cancel } = context;
  const { vm } = record.plan.request;
  const noting = ports.source.noteDirty(vm, record.session);
  const noted = await withDeadline(ports.clock, noting, NOTING_MS_MAX, `noting what ${vm} has written`, cancel);
  const taking = ports.target.takeBack(record.session, noted.round);
  const { pages } = await withDeadline(ports.clock, taking, NOTING_MS_MAX, `giving up what ${vm} has written`, cancel);
  return { ...noted, takenPages: pages };
}

interface Fetched {
  readonly bytes: number;
  readonly isDone: boolean;
  readonly progress: SessionProgress;
}

/** Fetches missing pages, and watches whether any come. */
class Fetching {
  readonly #context: StepContext;
  readonly #rate = new Rate();
  readonly #marks: Marks;
  #bytesBefore = 0;

  constructor(context: StepContext) {
    this.#context = context;
    this.#marks = newMarks(null, context.ports.clock.nowMs());
  }

  /** Fetches every missing page. Throws if no page arrives for long. */
  all(): Promise<Fetched> {
    return this.#until(LOOK_MS, false, ({ isDone }) => isDone);
  }

  /** Fetches for some time, and until nothing is in flight after that. Throws if no page arrives for long. */
  for(msMax: number): Promise<Fetched> {
    return this.#until(msMax, true, ({ isHeld }) => isHeld);
  }

  async #until(msMax: number, holds: boolean, isEnough: (fetched: FetchedAhead) => boolean): Promise<Fetched> {
    const { ports, limits, record, cancel } = this.#context;
    const fetchingMsMax = msMax + (holds ? HOLD_MS_MAX : 0) + limits.callMsMax;
    for (;;) {
      const fetching = ports.target.fetchAhead(record.session, msMax, holds);
      const what = 'fetching pages while the VM runs';
      const fetched = await withDeadline(ports.clock, fetching, fetchingMsMax, what, cancel);
      const asking = ports.target.progress(record.session);
      const asked = 'asking the target for progress';
      const progress = await withDeadline(ports.clock, asking, limits.callMsMax, asked, cancel);
      this.#note(progress);
      if (isEnough(fetched)) {
        const bytes = pushedBytes(progress) - this.#bytesBefore;
        this.#bytesBefore += bytes;
        return { bytes, isDone: fetched.isDone, progress };
      }
      await pause(ports.clock, limits.pollMs, cancel);
    }
  }

  #note(progress: SessionProgress): void {
    const { ports, limits, observer } = this.#context;
    refuseBroken(progress);
    const nowMs = ports.clock.nowMs();
    // Pages that were taken back count as often as they come.
    noteAdvance({ marks: this.#marks }, pushedBytes(progress), nowMs);
    this.#rate.note(nowMs, pushedBytes(progress));
    observer.onProgress(
      describeProgress({
        ...progress,
        pagesDone: progress.pagesPresent,
        bytesDone: pushedBytes(progress),
        bytesPerS: this.#rate.bytesPerS,
        faultCount: 0,
      }),
    );
    const quietMs = limits.pushQuietMsMax;
    if (progress.pagesPresent < progress.pagesTotal && nowMs - this.#marks.advancedAtMs > quietMs)
      throw standstill(quietMs, progress);
  }
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

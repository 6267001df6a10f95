/**
 * Decides how long memory is fetched while the VM still runs on its source: while more comes than the VM makes wrong.
 * Each page that is here at the switchover saves the VM a wait there. But each that is fetched and written again costs
 * bytes, and processors that the VM could use. Pure.
 */

/** Of what the last two rounds have fetched, the VM may have made this part wrong. With more, pushing does not pay. */
const WASTE_MAX = 0.5;
/**
 * A guest is hot that writes to this part of its memory, at this part of the rate at which pages come. Most of those
 * pages would be missing at the switchover all the same. As they lie scattered, each is fetched alone, which costs 2.5
 * times of what it costs in a row (over TCP: docs/BENCHMARKS.md). So after a sample of two rounds such a guest is moved
 * as by a post-copy.
 */
const HOT_MAX = 0.3;
const WRITTEN_MAX = 0.35;
/** Fetching so little after the switchover takes less time than a round. */
const SMALL_BYTES = 2 ** 20;
/** The first round is a sample: as short as one can be whose rates mean something. */
const ROUND_MS_MIN = 50;
/** The progress is shown after each round. */
const ROUND_MS_MAX = 5_000;
/** At most this part of the time goes by without fetching. */
const IDLE_MAX = 0.1;

/** Some time of fetching, and what the VM had written when it was over. */
export interface Round {
  readonly fetchedBytes: number;
  /** Of all the pages that are here; they are missing again. */
  readonly takenBackBytes: number;
  /** Of all pages. */
  readonly writtenBytes: number;
  /** In this round and in the one before. */
  readonly writtenAgainBytes: number;
  /** All pages were here before some were taken back. */
  readonly isAll: boolean;
  /** How long nothing was asked for: until nothing was in flight, and what was written was known and taken back. */
  readonly idleMs: number;
}

/** Whether to fetch on while the VM runs, or to stop it. `usedBytes`: the memory that is not known to be zero. */
export function nextRound(rounds: readonly Round[], usedBytes: number): 'push' | 'switch' {
  const [last, before] = [rounds.at(-1), rounds.at(-2)];
  if (last === undefined) return 'push';
  if (before !== undefined && isHot(before, last, usedBytes)) return 'switch';
  if (last.isAll && last.takenBackBytes <= SMALL_BYTES) return 'switch';
  const fetched = last.fetchedBytes + (before?.fetchedBytes ?? 0);
  const takenBack = last.takenBackBytes + (before?.takenBackBytes ?? 0);
  return takenBack > WASTE_MAX * fetched ? 'switch' : 'push';
}

/**
 * How much memory the VM writes to is known from how many pages two rounds have in common, as the number of fish in a
 * pond from how many of those that were caught and marked are caught again (Lincoln and Petersen's estimate).
 */
function isHot(before: Round, last: Round, usedBytes: number): boolean {
  const hotBytes = (before.writtenBytes * last.writtenBytes) / Math.max(1, last.writtenAgainBytes);
  const isFast = last.writtenBytes > WRITTEN_MAX * last.fetchedBytes;
  return isFast && last.writtenBytes > SMALL_BYTES && Math.min(hotBytes, usedBytes) > HOT_MAX * usedBytes;
}

/** How long the next round fetches. */
export function nextRoundMs(rounds: readonly Round[]): number {
  const idleMs = rounds.at(-1)?.idleMs ?? 0;
  return Math.round(Math.min(ROUND_MS_MAX, Math.max(ROUND_MS_MIN, idleMs / IDLE_MAX)));
}

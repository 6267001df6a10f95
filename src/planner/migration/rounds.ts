/**
 * Decides how long memory is fetched while the VM still runs on its source: while more comes than the VM makes wrong.
 * Each page that is here at the switchover saves the VM a wait there. But each that is fetched and written again costs
 * bytes, and processors that the VM could use. Pure.
 */

/** Of what the last two rounds have fetched, the VM may have made this part wrong. With more, pushing does not pay. */
const WASTE_MAX = 0.5;
/** Fetching so little after the switchover takes less time than a round. */
const SMALL_BYTES = 2 ** 20;
/** The first round is a sample: as short as one can be whose rates mean something. */
const ROUND_MS_MIN = 100;
/** The progress is shown after each round. */
const ROUND_MS_MAX = 5_000;
/** At most this part of the time goes by without fetching. */
const IDLE_MAX = 0.1;

/** Some time of fetching, and what the VM had written when it was over. */
export interface Round {
  readonly fetchedBytes: number;
  /** Of all the pages that are here; they are missing again. */
  readonly takenBackBytes: number;
  /** All pages were here before some were taken back. */
  readonly isAll: boolean;
  /** How long nothing was asked for: until nothing was in flight, and what was written was known and taken back. */
  readonly idleMs: number;
}

/** Whether to fetch on while the VM runs, or to stop it. At least one round has been made. */
export function nextRound(rounds: readonly Round[]): 'push' | 'switch' {
  const [last, before] = [rounds.at(-1), rounds.at(-2)];
  if (last === undefined) return 'push';
  if (last.isAll && last.takenBackBytes <= SMALL_BYTES) return 'switch';
  const fetched = last.fetchedBytes + (before?.fetchedBytes ?? 0);
  const takenBack = last.takenBackBytes + (before?.takenBackBytes ?? 0);
  return takenBack > WASTE_MAX * fetched ? 'switch' : 'push';
}

/** How long the next round fetches. */
export function nextRoundMs(rounds: readonly Round[]): number {
  const idleMs = rounds.at(-1)?.idleMs ?? 0;
  return Math.round(Math.min(ROUND_MS_MAX, Math.max(ROUND_MS_MIN, idleMs / IDLE_MAX)));
}

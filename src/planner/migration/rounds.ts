/** Decides how often memory is fetched again while the VM still runs on its source. Pure. */

/** A further round must promise to be shorter than the one before. Otherwise the VM writes as fast as pages come. */
const SHRINK_MAX = 0.7;
const ROUNDS_MAX = 8;
/** Fetching so little after the switchover takes less time than a round. */
const SMALL_BYTES = 2 ** 20;

/** What has been fetched, and how long it took. */
export interface Pass {
  readonly bytes: number;
  readonly ms: number;
}

export interface PushTrace {
  /** The first fetches all of the memory, each other one what the round before it has found. At least one. */
  readonly passes: readonly Pass[];
  /** For each pass, what the VM had written meanwhile: it has to be fetched again. */
  readonly dirtyBytes: readonly number[];
}

/** For a hybrid: whether to fetch what the last round has found while the VM runs on, or to stop the VM. */
export function nextRound({ passes, dirtyBytes }: PushTrace): 'push' | 'switch' {
  const last = dirtyBytes.at(-1);
  if (last === undefined) return 'push';
  const before = dirtyBytes.at(-2) ?? passes[0]?.bytes ?? 0;
  if (last <= SMALL_BYTES || dirtyBytes.length >= ROUNDS_MAX) return 'switch';
  return last < SHRINK_MAX * before ? 'push' : 'switch';
}

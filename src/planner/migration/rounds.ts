/** Decides how often memory is fetched again while the VM still runs on its source. Pure. */

/** A further round must promise to be shorter than the one before. Otherwise the VM writes as fast as pages come. */
const SHRINK_MAX = 0.7;
const ROUNDS_MAX = 8;
/** Fetching so little after the switchover takes less time than a round. */
const SMALL_BYTES = 2 ** 20;

export interface PushTrace {
  /** What the first pass over the memory has fetched. */
  readonly firstPassBytes: number;
  /** For each round so far, what the VM had written meanwhile: it has to be fetched again. */
  readonly rounds: readonly { readonly dirtyBytes: number }[];
}

/** Returns whether to fetch what the last round has found while the VM runs on, or to stop the VM. */
export function nextRound({ firstPassBytes, rounds }: PushTrace): 'push' | 'switch' {
  const last = rounds.at(-1);
  if (last === undefined) return 'push';
  const beforeBytes = rounds.at(-2)?.dirtyBytes ?? firstPassBytes;
  if (last.dirtyBytes <= SMALL_BYTES || rounds.length >= ROUNDS_MAX) return 'switch';
  return last.dirtyBytes < SHRINK_MAX * beforeBytes ? 'push' : 'switch';
}

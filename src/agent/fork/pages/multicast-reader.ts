/** Takes a host's seat in the multicast of an image, as soon as the root offers it. */
import { toMigrationError } from '../../../domain/errors.js';
import type { Clock } from '../../../engine/ports/clock.js';
import type { MulticastOffer, MulticastSeat } from '../../../engine/ports/fanout.js';
import type { Log } from '../../../kit/log.js';

/** The root copies its parent's pages first, which takes some tenths of a second. */
const WAIT_MS = 25;
/** After so many questions in a row without an answer the pages are read. */
const FAILURES_MAX = 4;
const FAILURE_MS = 250;

export interface MulticastReaderOptions {
  readonly image: string;
  readonly clock: Pick<Clock, 'sleep'>;
  readonly log: Log;
  readonly ask: () => Promise<MulticastOffer>;
  /** Resolves when the host receives. May reject. */
  readonly join: (seat: MulticastSeat) => Promise<void>;
  /** The pages are not wanted any more. */
  readonly isOver: () => boolean;
}

/** Resolves when the host receives (true), or when it cannot (false), so that the pages must be read. Never rejects. */
export async function takeSeat(options: MulticastReaderOptions): Promise<boolean> {
  const { image, clock, log, ask, join, isOver } = options;
  let failureCount = 0;
  while (!isOver()) {
    try {
      const offer = await ask();
      failureCount = 0;
      if (isOver() || offer.state === 'over') return false;
      if (offer.state === 'joined') {
        await join(offer.seat);
        return true;
      }
      await clock.sleep(WAIT_MS);
    } catch (error) {
      failureCount++;
      if (failureCount >= FAILURES_MAX) {
        log.warn({ image, err: toMigrationError(error) }, 'the multicast of an image cannot be received: it is read');
        return false;
      }
      await clock.sleep(FAILURE_MS);
    }
  }
  return false;
}

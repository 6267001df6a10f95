import { type MigrationRequest, MODE_TRAITS } from '../../domain/migration.js';
import { describeBytes } from '../bytes.js';

/**
 * Without a limit and without a measurement yet: what one 10 GbE link carries. Only for the texts and for generous
 * deadlines.
 */
const ASSUMED_BYTES_PER_S = 1_000_000_000;

export interface Estimate {
  /** To move every page once. */
  readonly moveMs: number;
  readonly notes: readonly string[];
}

export function estimate(request: MigrationRequest, memoryBytes: number): Estimate {
  const isLimited = request.bandwidthBytesPerS > 0;
  const bytesPerS = isLimited ? request.bandwidthBytesPerS : ASSUMED_BYTES_PER_S;
  const moveMs = (memoryBytes * 1000) / bytesPerS;
  const rate = isLimited
    ? `the limit of ${describeBytes(bytesPerS)}/s`
    : `${describeBytes(bytesPerS)}/s (no limit set)`;
  const notes = [
    `at most ${describeBytes(memoryBytes)} move; at ${rate} that takes ${describeMs(moveMs)}; zero pages are skipped`,
  ];
  const { mover, fetches } = MODE_TRAITS[request.mode];
  if (mover === 'pager') {
    notes.push(
      'the blackout does not depend on the memory size: only device state moves in it',
      `until the last page has arrived ${request.vm} needs both hosts`,
    );
  } else if (!fetches) {
    notes.push(`the VM stops when the rest fits ${request.downtimeMsMax} ms; a busy guest may never get there`);
  } else {
    notes.push("QEMU's post-copy cannot be taken up again by this build: a lost connection needs a person");
  }
  return { moveMs, notes };
}

function describeMs(ms: number): string {
  return ms < 1000 ? 'under a second' : `about ${Math.ceil(ms / 1000)} s`;
}

import { type MigrationRequest, MODE_TRAITS } from '../../domain/migration.js';
import { describeBytes } from '../bytes.js';

/**
 * Assumed rate if there is neither a limit nor a measurement: that of one 10 GbE link. Used only for texts and generous
 * deadlines.
 */
const ASSUMED_BYTES_PER_S = 1_000_000_000;

export interface Estimate {
  /** Time to move every page once. */
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
    `at most ${describeBytes(memoryBytes)} move, which takes ${describeMs(moveMs)} at ${rate}; zero pages are skipped`,
  ];
  const { mover, fetches } = MODE_TRAITS[request.mode];
  if (mover === 'pager') {
    notes.push(
      'the blackout does not depend on the memory size: only device state moves during it',
      `${request.vm} needs both hosts until the last page has arrived`,
    );
  } else if (!fetches) {
    notes.push(
      `the VM stops when the rest can be sent in ${request.downtimeMsMax} ms; with a busy guest that may never happen`,
    );
  } else {
    notes.push("this build cannot resume QEMU's post-copy after a lost connection; an operator has to");
  }
  return { moveMs, notes };
}

function describeMs(ms: number): string {
  return ms < 1000 ? 'under a second' : `about ${Math.ceil(ms / 1000)} s`;
}

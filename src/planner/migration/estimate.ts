import { bringsAllFirst, type MigrationRequest, MODE_TRAITS, tracksWrites } from '../../domain/migration.js';
import { describeBytes } from '../bytes.js';

/**
 * Assumed rate for deadlines if there is no limit: that of a slow link (100 Mbit/s), because a deadline must be
 * generous. No text names it: nobody has measured the link.
 */
const ASSUMED_BYTES_PER_S = 12_500_000;

export interface Estimate {
  /** Time to move every page once. */
  readonly moveMs: number;
  readonly notes: readonly string[];
}

export function estimate(request: MigrationRequest, memoryBytes: number): Estimate {
  const isLimited = request.bandwidthBytesPerS > 0;
  const bytesPerS = isLimited ? request.bandwidthBytesPerS : ASSUMED_BYTES_PER_S;
  const moveMs = (memoryBytes * 1000) / bytesPerS;
  const time = isLimited
    ? `which takes ${describeMs(moveMs)} at the limit of ${describeBytes(bytesPerS)}/s`
    : 'as fast as the link is (it has not been measured, and no limit is set)';
  const notes = tracksWrites(request.mode)
    ? [
        `at most ${describeBytes(memoryBytes)} move while ${request.vm} runs on the source, ${time}; ` +
          'zero pages are skipped',
        bringsAllFirst(request.mode)
          ? `what ${request.vm} writes meanwhile moves again, until the rest fits in ${request.downtimeMsMax} ms; ` +
            'if it never does, the VM stays where it is'
          : `what ${request.vm} writes meanwhile moves again, and what is left at the stop moves after it, on demand`,
      ]
    : [`at most ${describeBytes(memoryBytes)} move, ${time}; zero pages are skipped`];
  const { mover, fetches } = MODE_TRAITS[request.mode];
  if (mover === 'pager') {
    const moving = bringsAllFirst(request.mode) ? 'the rest and the device state move' : 'device state moves';
    notes.push(
      tracksWrites(request.mode)
        ? `during the blackout ${moving}, and the page tables are read twice: some milliseconds for each GiB`
        : 'the blackout does not depend on the memory size: only device state moves during it',
      bringsAllFirst(request.mode)
        ? `${request.vm} needs ${request.target} alone as soon as it runs there`
        : `${request.vm} needs both hosts until the last page has arrived`,
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

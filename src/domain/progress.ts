export interface PhaseTime {
  readonly name: string;
  readonly ms: number;
}

export interface MigrationProgress {
  readonly pagesTotal: number;
  readonly pagesDone: number;
  readonly bytesDone: number;
  readonly bytesPerS: number;
  readonly secondsLeft: number | null;
  readonly faultCount: number;
  /** The same for each host of a fork over several hosts. */
  readonly hosts?: readonly HostProgress[];
}

/**
 * waiting: the host has not answered since the commit. lazy: it reads only what its clones touch, so that its pages
 * need not become complete. lost: the host has no part of the fork any more, or its clones have ended, because their
 * pages cannot come, or stand still for good, because a page was wrong.
 */
export const HOST_FILL_STATES = ['waiting', 'filling', 'lazy', 'complete', 'lost'] as const;
export type HostFillState = (typeof HOST_FILL_STATES)[number];

export interface HostProgress {
  readonly host: string;
  readonly pagesTotal: number;
  readonly pagesDone: number;
  readonly bytesDone: number;
  readonly state: HostFillState;
}

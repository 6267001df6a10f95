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

export interface HostProgress {
  readonly host: string;
  readonly pagesTotal: number;
  readonly pagesDone: number;
  readonly bytesDone: number;
  /** lazy: the host reads only what its clones touch, so that its pages need not become complete. */
  readonly state: 'waiting' | 'filling' | 'lazy' | 'complete' | 'lost';
}

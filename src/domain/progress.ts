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
}

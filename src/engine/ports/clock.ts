export interface Clock {
  /** Monotonic clock, in milliseconds with fractions. */
  nowMs(): number;
  /** Wall clock, in ISO 8601 format. */
  isoNow(): string;
  /** Resolves after `ms`. An aborted signal ends the wait early, by resolving or rejecting. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
}

export interface Random {
  /** Unguessable bytes as lower-case hex. */
  hex(bytes: number): string;
}

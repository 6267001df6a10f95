export interface Clock {
  /** Monotonic, milliseconds with fractions. */
  nowMs(): number;
  /** Wall clock, ISO 8601. */
  isoNow(): string;
  /** Resolves after `ms`; an aborted signal ends it early, by resolving or rejecting. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
}

export interface Random {
  /** Unguessable, lower-case hex. */
  hex(bytes: number): string;
}

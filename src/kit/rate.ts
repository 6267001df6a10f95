/** Weight of the newest reading in the smoothed rate, which corresponds to the polls of half a second. */
const RATE_WEIGHT = 0.2;

/** Bytes per second, smoothed over the readings. */
export class Rate {
  bytesPerS = 0;
  #last: { ms: number; bytes: number } | null = null;

  note(ms: number, bytes: number): void {
    const last = this.#last;
    this.#last = { ms, bytes };
    if (last === null || ms <= last.ms) return;
    const now = (Math.max(0, bytes - last.bytes) * 1000) / (ms - last.ms);
    this.bytesPerS = this.bytesPerS === 0 ? now : this.bytesPerS + RATE_WEIGHT * (now - this.bytesPerS);
  }
}

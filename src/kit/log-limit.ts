/**
 * Bounds how often a message is logged, so that a stranger cannot fill a disk with lines about himself. What is not
 * logged is counted, and the number stands in the next line.
 */

const WINDOW_MS = 1_000;
const LINES_MAX = 10;

export class LogLimit {
  readonly #linesMax: number;
  readonly #nowMs: () => number;
  #beganAtMs = Number.NEGATIVE_INFINITY;
  #lineCount = 0;
  #omittedCount = 0;

  /** `linesMax`: in each second. */
  constructor(linesMax = LINES_MAX, nowMs: () => number = () => performance.now()) {
    this.#linesMax = linesMax;
    this.#nowMs = nowMs;
  }

  /** Calls `write` unless there have been too many lines, with what to add to the line about those left out. */
  log(write: (omitted: { readonly omittedCount?: number }) => void): void {
    const nowMs = this.#nowMs();
    if (nowMs - this.#beganAtMs >= WINDOW_MS) {
      this.#beganAtMs = nowMs;
      this.#lineCount = 0;
    }
    if (this.#lineCount >= this.#linesMax) {
      this.#omittedCount++;
      return;
    }
    this.#lineCount++;
    const omittedCount = this.#omittedCount;
    this.#omittedCount = 0;
    write(omittedCount === 0 ? {} : { omittedCount });
  }
}

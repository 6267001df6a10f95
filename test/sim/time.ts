import type { Clock } from '../../src/engine/ports/clock.js';

interface Timer {
  readonly atMs: number;
  readonly order: number;
  readonly fire: () => void;
  isCancelled: boolean;
}

/** Never resolves: the continuation of a process that has been killed. */
export const NEVER: Promise<never> = new Promise(() => undefined);

/**
 * Simulated time. It advances only when nothing else is left to do. Timers that are due together fire in random order.
 */
export class Time {
  nowMs = 0;
  readonly #timers: Timer[] = [];
  readonly #order: () => number;

  constructor(order: () => number) {
    this.#order = order;
  }

  after(ms: number, fire: () => void): () => void {
    const timer = { atMs: this.nowMs + Math.max(0, ms), order: this.#order(), fire, isCancelled: false };
    this.#timers.push(timer);
    return () => {
      timer.isCancelled = true;
    };
  }

  /** Runs until `isDone` returns true. Returns false if no event is left, or `msMax` have passed, before that. */
  async run(isDone: () => boolean, msMax: number): Promise<boolean> {
    const endMs = this.nowMs + msMax;
    for (;;) {
      // All promises have settled before an immediate runs, because the simulation does no I/O.
      await new Promise((resolve) => setImmediate(resolve));
      if (isDone()) return true;
      let next = this.#takeNext();
      if (next === null) {
        // isDone may have started something.
        await new Promise((resolve) => setImmediate(resolve));
        next = this.#takeNext();
      }
      if (next === null || next.atMs > endMs) return false;
      this.nowMs = Math.max(this.nowMs, next.atMs);
      next.fire();
    }
  }

  #takeNext(): Timer | null {
    let best = -1;
    for (let index = 0; index < this.#timers.length; index++) {
      const timer = this.#timers[index]!;
      if (timer.isCancelled) {
        this.#timers[index] = this.#timers.at(-1)!;
        this.#timers.pop();
        index--;
        continue;
      }
      const known = this.#timers[best];
      if (known === undefined || timer.atMs < known.atMs || (timer.atMs === known.atMs && timer.order < known.order)) {
        best = index;
      }
    }
    if (best < 0) return null;
    const [timer] = this.#timers.splice(best, 1);
    return timer ?? null;
  }
}

/** One life of one process. Once the process is dead, everything that it awaits stays pending. */
export class Life {
  #isAlive = true;
  readonly #time: Time;
  #watchers: (() => void)[] = [];

  constructor(time: Time) {
    this.#time = time;
  }

  get isAlive(): boolean {
    return this.#isAlive;
  }

  kill(): void {
    this.#isAlive = false;
    for (const tell of this.#watchers.splice(0)) tell();
  }

  onDeath(tell: () => void): void {
    this.#watchers.push(tell);
  }

  async sleep(ms: number, signal?: AbortSignal): Promise<void> {
    await new Promise<void>((resolve) => {
      if (signal?.aborted) {
        resolve();
        return;
      }
      const onAbort = () => {
        cancel();
        resolve();
      };
      const cancel = this.#time.after(ms, () => {
        signal?.removeEventListener('abort', onAbort);
        resolve();
      });
      signal?.addEventListener('abort', onAbort, { once: true });
    });
    if (!this.isAlive) await NEVER;
  }

  async survive(): Promise<void> {
    if (!this.isAlive) await NEVER;
  }

  get clock(): Clock {
    return {
      nowMs: () => this.#time.nowMs,
      isoNow: () => new Date(1_700_000_000_000 + this.#time.nowMs).toISOString(),
      sleep: (ms, signal) => this.sleep(ms, signal),
    };
  }
}

/** A queue of events by time: a binary heap in two arrays of numbers, because millions of events pass through it. */
export class EventQueue {
  #times = new Float64Array(1024);
  #values = new Float64Array(1024);
  #count = 0;

  get count(): number {
    return this.#count;
  }

  push(atS: number, value: number): void {
    if (this.#count === this.#times.length) this.#grow();
    let at = this.#count++;
    while (at > 0) {
      const above = (at - 1) >> 1;
      if (this.#timeAt(above) <= atS) break;
      this.#move(above, at);
      at = above;
    }
    this.#times[at] = atS;
    this.#values[at] = value;
  }

  /** The time of the first event. Infinity if there is none. */
  get nextS(): number {
    return this.#count === 0 ? Infinity : this.#timeAt(0);
  }

  /** Removes the first event and returns its value. */
  pop(): number {
    const value = this.#values[0] ?? 0;
    const last = --this.#count;
    const atS = this.#timeAt(last);
    const moved = this.#values[last] ?? 0;
    let at = 0;
    for (let below = 1; below < last; below = 2 * at + 1) {
      if (below + 1 < last && this.#timeAt(below + 1) < this.#timeAt(below)) below++;
      if (this.#timeAt(below) >= atS) break;
      this.#move(below, at);
      at = below;
    }
    this.#times[at] = atS;
    this.#values[at] = moved;
    return value;
  }

  #timeAt(index: number): number {
    return this.#times[index] ?? 0;
  }

  #move(from: number, to: number): void {
    this.#times[to] = this.#timeAt(from);
    this.#values[to] = this.#values[from] ?? 0;
  }

  #grow(): void {
    const times = new Float64Array(2 * this.#times.length);
    const values = new Float64Array(2 * this.#values.length);
    times.set(this.#times);
    values.set(this.#values);
    this.#times = times;
    this.#values = values;
  }
}

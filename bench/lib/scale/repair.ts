/** Hosts that read what they have lost from their siblings, nearest first, and the rest from the root. */
import { SIBLINGS_PER_LEVEL, siblings } from '../../../src/planner/fanout/siblings.js';
import { type Case, CHUNKS, connectionBytesPerS, type Outcome, REQUEST_S } from './case.js';
import { EventQueue } from './events.js';

/** Parts of the image that a host repairs one after the other, each from one holder. */
const PARTS = 16;
const CHUNKS_PER_PART = CHUNKS / PARTS;
const PAGE_BYTES = 4096;

export class Repair {
  readonly #world: Case;
  /** The share of each part that is missing. By host, then part. */
  readonly #missing: Float64Array;
  readonly #partBytes: number;

  constructor(world: Case) {
    this.#world = world;
    this.#missing = new Float64Array(world.hosts.length * PARTS);
    this.#partBytes = world.imageBytes / PARTS;
  }

  /** A share of what is between two places, in chunks, has not come to the host. */
  lose(host: number, fromChunk: number, toChunk: number, share: number): void {
    const from = fromChunk / CHUNKS_PER_PART;
    const to = toChunk / CHUNKS_PER_PART;
    for (let part = Math.floor(from); part < Math.min(PARTS, to); part++) {
      const overlap = Math.min(to, part + 1) - Math.max(from, part);
      const index = host * PARTS + part;
      this.#missing[index] = Math.min(1, (this.#missing[index] ?? 0) + share * overlap);
    }
  }

  /** `beginS`: when each host begins, by its index. */
  run(beginS: readonly number[]): Outcome {
    const { hosts, network, dying, loss } = this.#world;
    const nearOf = this.#siblings();
    const deadAtS = new Map(dying.map(({ host, atS }) => [host, atS]));
    const isDead = (host: number, atS: number): boolean => (deadAtS.get(host) ?? Infinity) <= atS;
    const fullS: (number | null)[] = hosts.map(() => null);
    const connection = connectionBytesPerS(loss);
    const queue = new EventQueue();
    const steps = new Int32Array(hosts.length);
    // Each host reads from all siblings of a level at once.
    const readsLeft = hosts.map(() => SIBLINGS_PER_LEVEL);
    for (let host = 1; host < hosts.length; host++) {
      for (let read = 0; read < SIBLINGS_PER_LEVEL; read++) queue.push(beginS[host] ?? 0, host);
    }
    while (queue.count > 0) {
      const atS = queue.nextS;
      const host = queue.pop();
      if (isDead(host, atS)) continue;
      const levels = nearOf(host);
      let next: { holder: number; index: number; foundBytes: number } | null = null;
      for (let step = steps[host] ?? 0; next === null; step++) {
        const found = holderAt(levels, step, host);
        steps[host] = step + 1;
        if (found === null) break;
        const index = host * PARTS + found.part;
        const missing = this.#missing[index] ?? 0;
        if (missing * this.#partBytes < PAGE_BYTES || (found.holder !== 0 && isDead(found.holder, atS))) continue;
        // Hosts lose independently of each other, so this is the share of what is missing here that is missing there.
        const there = found.holder === 0 ? 0 : (this.#missing[found.holder * PARTS + found.part] ?? 0);
        const foundBytes = missing * (1 - there) * this.#partBytes;
        if (foundBytes >= PAGE_BYTES) next = { holder: found.holder, index, foundBytes };
      }
      if (next === null) {
        readsLeft[host] = (readsLeft[host] ?? 0) - 1;
        if (readsLeft[host] === 0) fullS[host] = atS;
        continue;
      }
      const { holder, index, foundBytes } = next;
      const sentS = network.send(holder, host, foundBytes, atS + 2 * REQUEST_S);
      this.#missing[index] = Math.max(0, (this.#missing[index] ?? 0) - foundBytes / this.#partBytes);
      queue.push(Math.max(sentS, atS + foundBytes / connection), host);
    }
    return { fullS, rootEgressBytes: network.rootEgressBytes };
  }

  #siblings(): (host: number) => readonly (readonly number[])[] {
    const { hosts, topology } = this.#world;
    const indexOf = new Map(hosts.map((host, index) => [host, index]));
    const near = siblings({ topology, hosts: hosts.slice(1) });
    return (host) => near(hosts[host] ?? '').map((level) => level.map((name) => indexOf.get(name) ?? 0));
  }
}

/** Level by level each part is asked for at each holder, each host beginning at another one; then at the root. */
function holderAt(
  levels: readonly (readonly number[])[],
  step: number,
  host: number,
): { holder: number; part: number } | null {
  let pass = Math.floor(step / PARTS);
  const part = (step + host) % PARTS;
  for (const level of levels) {
    if (pass < level.length) return { holder: level[(pass + part) % level.length] ?? 0, part };
    pass -= level.length;
  }
  return pass === 0 ? { holder: 0, part } : null;
}

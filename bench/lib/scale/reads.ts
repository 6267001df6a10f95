/** Hosts that read the image chunk by chunk from a near holder while that one still fills, or from the root. */
import { type Case, CHUNKS, connectionBytesPerS, type Outcome, REQUEST_S } from './case.js';
import { EventQueue } from './events.js';

/** Chunks that a host has asked for and not got. */
const WINDOW = 2;
/** Until a host whose holder had nothing new looks again, on average. */
const LOOK_S = 5e-3;

export interface Reading {
  /** The hosts that read. */
  readonly readers: readonly number[];
  /** From whom each reads, nearest first, without the root. */
  readonly parents: (host: number) => readonly number[];
  /** A chunk has come to a host. */
  readonly onChunk?: (host: number, chunk: number, atS: number) => void;
}

export function simulateReads(world: Case, reading: Reading): Outcome {
  const simulation = new Reads(world, reading);
  simulation.run();
  return { fullS: simulation.fullS, rootEgressBytes: world.network.rootEgressBytes };
}

class Reads {
  readonly fullS: (number | null)[];
  readonly #world: Case;
  readonly #reading: Reading;
  readonly #queue = new EventQueue();
  readonly #hostCount: number;
  /** 0: absent, 1: asked for, 2: here. By host, then chunk. */
  readonly #chunks: Uint8Array;
  /** Chunks below are asked for or here. */
  readonly #low: Uint16Array;
  /** No chunk from here on is here. */
  readonly #high: Uint16Array;
  readonly #missing: Uint16Array;
  readonly #pending: Uint8Array;
  /** The holder that each host reads from. */
  readonly #holder: Int32Array;
  /** When the last chunk on the connection comes. */
  readonly #lastS: Float64Array;
  readonly #readersOf: Set<number>[];
  readonly #isDead: Uint8Array;
  readonly #connectionS: number;

  constructor(world: Case, reading: Reading) {
    const count = world.hosts.length;
    this.#world = world;
    this.#reading = reading;
    this.#hostCount = count;
    this.fullS = world.hosts.map(() => null);
    this.#chunks = new Uint8Array(count * CHUNKS);
    this.#low = new Uint16Array(count);
    this.#high = new Uint16Array(count);
    this.#missing = new Uint16Array(count).fill(CHUNKS);
    this.#pending = new Uint8Array(count);
    this.#holder = new Int32Array(count);
    this.#lastS = new Float64Array(count);
    this.#readersOf = world.hosts.map(() => new Set<number>());
    this.#isDead = new Uint8Array(count);
    this.#connectionS = world.chunkBytes / connectionBytesPerS(world.loss);
    this.#chunks.fill(2, 0, CHUNKS);
    this.#high[0] = CHUNKS;
  }

  run(): void {
    const { dying } = this.#world;
    let dead = 0;
    for (const host of this.#reading.readers) this.#attach(host, 0);
    while (this.#queue.count > 0) {
      const death = dying[dead];
      if (death !== undefined && death.atS <= this.#queue.nextS) {
        dead++;
        this.#die(death.host, death.atS);
        continue;
      }
      const atS = this.#queue.nextS;
      const value = this.#queue.pop();
      const chunk = value % CHUNKS;
      const pair = Math.floor(value / CHUNKS);
      this.#arrive(pair % this.#hostCount, Math.floor(pair / this.#hostCount), chunk, atS);
    }
  }

  /** Reads on from the nearest holder that lives. */
  #attach(host: number, atS: number): void {
    const holder = this.#reading.parents(host).find((parent) => this.#isDead[parent] === 0) ?? 0;
    this.#holder[host] = holder;
    this.#readersOf[holder]?.add(host);
    this.#lastS[host] = atS;
    this.#pump(host, atS + REQUEST_S);
  }

  #arrive(host: number, holder: number, chunk: number, atS: number): void {
    // The holder, or the host itself, has died meanwhile.
    if (this.#isDead[host] === 1 || this.#holder[host] !== holder || this.#chunks[host * CHUNKS + chunk] === 2) return;
    this.#chunks[host * CHUNKS + chunk] = 2;
    this.#high[host] = Math.max(this.#high[host] ?? 0, chunk + 1);
    this.#pending[host] = Math.max(0, (this.#pending[host] ?? 0) - 1);
    const missing = (this.#missing[host] ?? 0) - 1;
    this.#missing[host] = missing;
    if (missing === 0) this.fullS[host] = atS;
    this.#reading.onChunk?.(host, chunk, atS);
    this.#pump(host, atS);
    for (const reader of this.#readersOf[host] ?? []) {
      if ((this.#pending[reader] ?? 0) < WINDOW) this.#pump(reader, atS + LOOK_S);
    }
  }

  /** Asks for the first chunks that the holder has and the host has not. */
  #pump(host: number, atS: number): void {
    const { network, chunkBytes } = this.#world;
    const holder = this.#holder[host] ?? 0;
    const own = host * CHUNKS;
    const there = holder * CHUNKS;
    let low = this.#low[host] ?? 0;
    while (low < CHUNKS && this.#chunks[own + low] !== 0) low++;
    this.#low[host] = low;
    const high = this.#high[holder] ?? 0;
    for (let chunk = low; chunk < high && (this.#pending[host] ?? 0) < WINDOW; chunk++) {
      if (this.#chunks[own + chunk] !== 0 || this.#chunks[there + chunk] !== 2) continue;
      this.#chunks[own + chunk] = 1;
      this.#pending[host] = (this.#pending[host] ?? 0) + 1;
      const sentS = network.send(holder, host, chunkBytes, atS + REQUEST_S);
      const doneS = Math.max(sentS, (this.#lastS[host] ?? 0) + this.#connectionS);
      this.#lastS[host] = doneS;
      this.#queue.push(doneS, (holder * this.#hostCount + host) * CHUNKS + chunk);
    }
  }

  #die(host: number, atS: number): void {
    this.#isDead[host] = 1;
    this.fullS[host] = null;
    this.#readersOf[this.#holder[host] ?? 0]?.delete(host);
    for (const reader of this.#readersOf[host] ?? []) {
      // What was asked for is lost with the connection.
      for (let chunk = 0; chunk < CHUNKS; chunk++) {
        if (this.#chunks[reader * CHUNKS + chunk] === 1) this.#chunks[reader * CHUNKS + chunk] = 0;
      }
      this.#low[reader] = 0;
      this.#pending[reader] = 0;
      this.#attach(reader, atS);
    }
    this.#readersOf[host]?.clear();
  }
}

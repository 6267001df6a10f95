/**
 * The addon's part of reading an image in the simulation. It keeps the rules of docs/PAGE_STATES.md: what near holders
 * and a multicast may still bring is not swept from the root; what clones touch is asked of all.
 */
import type { MulticastJoin } from '../../../src/native/multicast-types.js';
import type { NearPlace, NearSnapshot } from '../../../src/native/near-types.js';
import type { ImageFetchHandle, SourceAddress } from '../../../src/native/types.js';
import { type ForkHost, type ForkNote, type ForkWorld, type Image, PAGES } from '../fork-world.js';
import type { Life } from '../time.js';
import { failure } from './replies.js';

const PAGE_MS = 4;
/** Who finds nothing to read looks less and less often. */
const IDLE_MS_MAX = 500;
const CONNECT_MS = 1;
const SILENT_MS = 1_000;
const PAGE_BYTES = 4096n;
/** The first pages are those that the clones touch, sooner or later. */
const TOUCHED = PAGES / 4;

export interface ReaderParts {
  readonly world: ForkWorld;
  readonly host: ForkHost;
  readonly life: Life;
  readonly note: ForkNote;
  readonly image: Image;
  /** Null: the root does not give the page now. */
  readonly readRoot: (index: number) => Promise<number | null>;
}

interface Near extends NearPlace {
  readonly holder: ForkHost;
  /** The daemon that has answered. */
  readonly life: Life;
  isConnected: boolean;
  bytes: bigint;
  heardAtMs: number;
}

type Handle = Pick<ImageFetchHandle, 'addNear' | 'removeNear' | 'nears' | 'joinMulticast' | 'sweep'>;

export class SimReader implements Handle {
  readonly #parts: ReaderParts;
  readonly #nears = new Map<number, Near>();
  #session: string | null = null;
  #heardAtMs = 0;
  #isSweeping = false;
  #isOpen = true;
  multicastPages = 0;

  constructor(parts: ReaderParts) {
    this.#parts = parts;
    const { readers } = parts.world.fanout;
    readers.add(this);
    parts.life.onDeath(() => readers.delete(this));
  }

  get host(): string {
    return this.#parts.host.name;
  }

  /** The fork goes on here, and its image is still the one that is read. */
  get isWanted(): boolean {
    const { host, note, image, world } = this.#parts;
    if (world.fanout.is('keepReading')) return true;
    return host.forks.get(note.fork) === note && host.images.get(note.image) === image;
  }

  get isComplete(): boolean {
    return !this.#parts.image.pages.includes(null);
  }

  snapshot(): { readonly state: 'complete' | 'copying' } {
    return { state: this.isComplete ? 'complete' : 'copying' };
  }

  async addNear({ host }: SourceAddress, { id, level }: NearPlace): Promise<void> {
    const { world, life } = this.#parts;
    await life.sleep(CONNECT_MS);
    const holder = world.host(host);
    if (holder.life === null || !world.isLinked(this.host, host)) throw failure('UNREACHABLE', host);
    if (this.#nears.get(id)?.isConnected === true) throw failure('CONFLICT', `${id} is connected`);
    const near = { id, level, holder, life: holder.life, isConnected: true, bytes: 0n, heardAtMs: world.time.nowMs };
    this.#nears.set(id, near);
  }

  removeNear(id: number): void {
    this.#nears.delete(id);
  }

  nears(): readonly NearSnapshot[] {
    return [...this.#nears.values()].map((near) => {
      this.#look(near);
      const { id, level, isConnected, bytes } = near;
      return { id, level, isConnected, bytes, failure: null };
    });
  }

  async joinMulticast({ session, member }: MulticastJoin): Promise<void> {
    const { world } = this.#parts;
    if (this.#session !== null) world.fail(`${this.host} joins twice`);
    world.fanout.takeSeat(this.host, session, member);
    this.#session = session;
    this.#heardAtMs = world.time.nowMs;
  }

  receive(session: string, index: number, page: number): void {
    const { image, world } = this.#parts;
    if (session !== this.#session) return;
    this.#heardAtMs = world.time.nowMs;
    if (image.pages[index] !== null) return;
    image.pages[index] = page;
    this.multicastPages++;
  }

  receiveEnd(session: string): void {
    if (session === this.#session) this.#session = null;
  }

  sweep(): void {
    this.#isSweeping = true;
  }

  close(): void {
    this.#isOpen = false;
    this.#parts.world.fanout.readers.delete(this);
  }

  /** Reads until all pages are here, or nobody wants them any more. */
  async run(): Promise<void> {
    const { world, host, life, image } = this.#parts;
    let waitMs = PAGE_MS;
    while (this.#isOpen && this.isWanted && !this.isComplete) {
      await life.sleep(waitMs);
      const absent = image.pages.flatMap((page, index) => (page === null ? [index] : []));
      if (absent.length === 0) return;
      const index = world.chance.pick(absent);
      const found = this.#readNear(index) ?? (await this.#readRoot(index));
      waitMs = found === null ? Math.min(waitMs * 1.5, IDLE_MS_MAX) : PAGE_MS;
      if (found === null || !this.isWanted) continue;
      image.pages[index] ??= found;
      world.event(`${host.name} page ${index}`);
      await life.survive();
    }
  }

  #readNear(index: number): number | null {
    const { world, note } = this.#parts;
    for (const near of [...this.#nears.values()].sort((one, other) => one.level - other.level)) {
      this.#look(near);
      if (!near.isConnected) continue;
      const held = near.holder.images.get(note.image)?.pages[index];
      const page = held ?? (world.fanout.is('giveAbsent') ? 0 : null);
      if (page === null) continue;
      near.heardAtMs = world.time.nowMs;
      near.bytes += PAGE_BYTES;
      return page;
    }
    return null;
  }

  async #readRoot(index: number): Promise<number | null> {
    const { fanout, chance } = this.#parts.world;
    const isTouched = index < TOUCHED && chance.below(TOUCHED) === 0;
    if (!isTouched && (!this.#isSweeping || this.#isMoreExpected)) return null;
    if (fanout.is('relaysOnly') && !isTouched && (this.#parts.note.fanout?.levels.length ?? 0) > 0) return null;
    return this.#parts.readRoot(index);
  }

  /** Something nearer than the root may still bring pages. */
  get #isMoreExpected(): boolean {
    const { time, fanout } = this.#parts.world;
    const isHeard = (atMs: number): boolean => time.nowMs - atMs < SILENT_MS;
    if (this.#session !== null && (isHeard(this.#heardAtMs) || fanout.is('trustGroup'))) return true;
    return [...this.#nears.values()].some(({ isConnected, heardAtMs }) => isConnected && isHeard(heardAtMs));
  }

  /** A connection ends with the daemon, with the network between, and with the image there. */
  #look(near: Near): void {
    const { world, note } = this.#parts;
    const { holder, life } = near;
    near.isConnected &&= life.isAlive && world.isLinked(this.host, holder.name) && holder.images.has(note.image);
  }
}

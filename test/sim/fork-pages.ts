/** How pages come to a simulated host: copied from the parent on the root, and read from the root elsewhere. */
import { toMigrationError } from '../../src/domain/errors.js';
import type { Transport } from '../../src/domain/transport.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { HostFanout } from './fork/host-fanout.js';
import { type ForkHost, type ForkNote, type ForkWorld, PAGES, ROOT } from './fork-world.js';
import type { Life } from './time.js';

/** Slow enough that the image still fills when the clones run. */
const PAGE_MS = 4;
const RECONNECT_MS = 200;
/** A host that has joined and hears nothing asks so often. */
const ASK_MS = 5_000;

export interface PagesParts {
  readonly world: ForkWorld;
  readonly host: ForkHost;
  readonly life: Life;
  readonly peer: (host: string) => HostPort;
  readonly fanout: HostFanout;
  /** Removes a fork that will never be committed. */
  readonly discard: (fork: string) => Promise<void>;
  /** Whether the host discards a fork of which it hears this. */
  readonly isOver: (decision: string) => boolean;
}

export class ForkPages {
  readonly #parts: PagesParts;
  /** The life of the root that answers, by fork. It is over with the life, and with the connection. */
  readonly #connections = new Map<string, Life>();
  readonly #reading = new Set<string>();

  constructor(parts: PagesParts) {
    this.#parts = parts;
  }

  /** The copier of the root. The parent's files remain when the parent dies. */
  async fill({ image: id }: ForkNote): Promise<void> {
    const { world, host, life } = this.#parts;
    for (let index = 0; index < PAGES; index++) {
      const image = host.images.get(id);
      if (image === undefined) return;
      if (image.pages[index] !== null) continue;
      await life.sleep(PAGE_MS);
      // The fork was discarded or finished meanwhile.
      if (!host.images.has(id) || world.parent.protectedFor !== id) return;
      // The parent may have written the page during the sleep, which has copied it.
      image.pages[index] ??= world.parent.pages[index] ?? null;
      world.event(`page ${index}`);
      await life.survive();
    }
  }

  /** Asks the root for its pages. Throws what the root says. */
  async connect({ fork, image, origin }: ForkNote, transport: Transport): Promise<void> {
    const { world, host, peer } = this.#parts;
    if (origin === null) return;
    await peer(origin).forks.serveImage(image, host.name, transport);
    const { life } = world.host(origin);
    if (life !== null) this.#connections.set(fork, life);
  }

  /** Reads what the root has, until all is here. A connection that is lost is made again. */
  async read(note: ForkNote): Promise<void> {
    const { world, host, life } = this.#parts;
    const { fork, image: id } = note;
    if (this.#reading.has(fork)) return;
    this.#reading.add(fork);
    this.#parts.fanout.hold(id);
    if (note.fanout !== null) return this.#parts.fanout.read(note, (index) => this.#readRoot(note, index));
    while (host.forks.get(fork) === note) {
      const image = host.images.get(id);
      const index = image?.pages.indexOf(null) ?? -1;
      if (image === undefined || index < 0) return;
      const page = await this.#readRoot(note, index);
      if (page === null || host.images.get(id) !== image) continue;
      image.pages[index] = page;
      world.event(`${host.name} page ${index}`);
      await life.survive();
    }
  }

  /** Null: the root does not give the page now. A connection that is lost is made again. */
  async #readRoot(note: ForkNote, index: number): Promise<number | null> {
    const { world, host, life } = this.#parts;
    const { fork, image } = note;
    if (!this.isConnected(fork)) {
      await life.sleep(RECONNECT_MS);
      if (host.forks.get(fork) === note) await this.connect(note, 'tcp').catch(() => undefined);
      return null;
    }
    await life.sleep(PAGE_MS);
    return this.isConnected(fork) ? pageOfRoot(world, image, index) : null;
  }

  /** Resolves when the root answers: a QEMU that loads the state waits for pages. False: the fork is over. */
  async reaches(note: ForkNote): Promise<boolean> {
    const { host, life } = this.#parts;
    while (!this.isConnected(note.fork)) {
      await life.sleep(RECONNECT_MS);
      if (host.forks.get(note.fork) !== note) return false;
    }
    return true;
  }

  isConnected(fork: string): boolean {
    const { world, host } = this.#parts;
    return this.#connections.get(fork)?.isAlive === true && world.isLinked(host.name, ROOT);
  }

  /** A host that has joined asks until the fork is decided, in case nobody tells it. */
  async askUntilDecided(note: ForkNote): Promise<void> {
    const { host, life, peer, discard, isOver } = this.#parts;
    const isUndecided = (): boolean => host.forks.get(note.fork) === note && !note.isCommitted;
    for (;;) {
      await life.sleep(ASK_MS);
      if (!isUndecided() || note.origin === null) return;
      try {
        const { decision } = await peer(note.origin).forks.forkDecision(note.fork);
        if (isUndecided() && isOver(decision)) await discard(note.fork);
      } catch (error) {
        // It asks again.
        toMigrationError(error);
      }
    }
  }
}

/** The page as the root gives it to a reader, or null if it gives none yet. */
function pageOfRoot({ root, parent, points }: ForkWorld, id: string, index: number): number | null {
  const image = root.images.get(id);
  if (image === undefined || !points.has(id)) return null;
  if (image.pages[index] === null && parent.protectedFor === id) image.pages[index] = parent.pages[index] ?? null;
  return image.pages[index] ?? null;
}

/** The addon's part of a multicast in the simulation: it sends each page of an image once. */
import type { MulticastSenderHandle, MulticastSenderSnapshot } from '../../../src/native/multicast-types.js';
import { type ForkWorld, PAGES } from '../fork-world.js';
import type { Life } from '../time.js';

const SEND_MS = 2;
const PAGE_BYTES = 4096n;

export interface SenderParts {
  readonly world: ForkWorld;
  readonly host: string;
  readonly life: Life;
  readonly image: string;
  readonly session: string;
  readonly onEdge: () => void;
}

export class SimSender implements MulticastSenderHandle {
  readonly #parts: SenderParts;
  #state: MulticastSenderSnapshot['state'] = 'waiting';
  #sentBytes = 0n;

  constructor(parts: SenderParts) {
    this.#parts = parts;
    const { senders } = parts.world.fanout;
    senders.add(this);
    parts.life.onDeath(() => senders.delete(this));
  }

  start(): void {
    if (this.#state !== 'waiting') return;
    this.#state = 'sending';
    void this.#send();
  }

  snapshot(): MulticastSenderSnapshot {
    const none = { sentPages: 0n, pagesTotal: 0n, sentDatagrams: 0n, rateBytesPerS: 0n, cpuNs: 0n };
    return { state: this.#state, failure: null, counters: { ...none, sentBytes: this.#sentBytes }, members: [] };
  }

  async close(): Promise<void> {
    this.#state = 'closed';
    this.#parts.world.fanout.senders.delete(this);
  }

  async #send(): Promise<void> {
    const { world, life, image: id, session, onEdge } = this.#parts;
    for (let index = 0; index < PAGES; index++) {
      await life.sleep(SEND_MS);
      if (this.#state !== 'sending') return;
      const image = world.root.images.get(id);
      if (image === undefined) return world.fail('a multicast sends an image that is not there any more');
      const page = image.pages[index] ?? 0;
      for (const reader of this.#hearing()) reader.receive(session, index, page);
      this.#sentBytes += PAGE_BYTES;
      world.event(`${this.#parts.host} sends page ${index} to all`);
      await life.survive();
    }
    if (this.#state !== 'sending') return;
    for (const reader of this.#hearing()) reader.receiveEnd(session);
    world.event(`${this.#parts.host} has sent all`);
    await life.survive();
    if (world.fanout.is('neverEnd')) return;
    this.#state = 'ended';
    onEdge();
  }

  /** A tenth of the datagrams is lost on the way to each host. */
  #hearing() {
    const { world, host } = this.#parts;
    const { readers, isGroupSilent } = world.fanout;
    if (isGroupSilent) return [];
    return [...readers].filter((reader) => world.isLinked(host, reader.host) && world.chance.below(10) > 0);
  }
}

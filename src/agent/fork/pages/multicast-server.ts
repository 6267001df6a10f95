/**
 * Sends the pages of complete images to groups: each page once to all hosts that read the image. Like serving, it
 * belongs to the image, not to a fork. A multicast that a restart of the daemon has ended is not begun again: its hosts
 * get what they lack from each other and by reading.
 */
import { randomBytes } from 'node:crypto';
import { isIPv4 } from 'node:net';
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import type { MulticastGroup, MulticastProvider } from '../../../domain/fanout.js';
import type { MulticastOffer, MulticastSeat, MulticastSent } from '../../../engine/ports/fanout.js';
import { failureToError } from '../../../native/failure.js';
import type { MulticastJoin, MulticastSenderHandle } from '../../../native/multicast-types.js';
import type { ImageContext } from '../../image/context.js';
import type { MulticastConfig } from '../../vm/context.js';

/** How long the first host waits for the others: their clones have been let go in the same moment. */
const JOIN_MS_MAX = 300;
/** Multicasts that are over, of which somebody may still ask. */
const REMEMBERED_MAX = 64;
const KEY_BYTES = 32;
const SESSION_BYTES = 8;
/** Scope of a site (RFC 2365). Two further bytes of the address tell fan-outs apart. */
const GROUP_PREFIX = '239.255';

/** Returns a group that no other fan-out uses, by all chance. Session and key tell datagrams apart in any case. */
export function newGroup(
  { group, port, ttl }: MulticastConfig,
  provider: MulticastProvider,
  mtuBytes: number,
): MulticastGroup {
  const session = randomBytes(SESSION_BYTES);
  return {
    provider,
    group: group ?? `${GROUP_PREFIX}.${session.readUInt8(0)}.${session.readUInt8(1)}`,
    ...{ port, ttl, mtuBytes },
    key: randomBytes(KEY_BYTES).toString('hex'),
    session: session.toString('hex'),
  };
}

/**
 * The address of the interface that a group is used on. Null: the system chooses one by its routes. Throws UNSUPPORTED
 * if this host has none for the provider.
 */
export async function interfaceOf(
  { dataAddress, rdma, host }: Pick<ImageContext, 'dataAddress' | 'rdma' | 'host'>,
  provider: MulticastProvider,
): Promise<string | null> {
  if (provider === 'verbs') {
    const { address, problem } = await rdma.inventory();
    if (address !== null) return address;
    throw new MigrationError('UNSUPPORTED', `no multicast by RDMA on ${host}: ${problem?.reason ?? 'no address'}`);
  }
  return isIPv4(dataAddress) && dataAddress !== '0.0.0.0' ? dataAddress : null;
}

/** What the native side needs to take a seat on this host. */
export async function joinOf(context: ImageContext, { group, member }: MulticastSeat): Promise<MulticastJoin> {
  return { ...group, member, interfaceAddress: await interfaceOf(context, group.provider) };
}

export class MulticastServer {
  readonly #context: ImageContext;
  readonly #multicasts = new Map<string, Promise<ImageMulticast>>();
  /** What the last multicast of an image has sent, for the report of its fork. */
  readonly #sentBytes = new Map<string, number>();

  constructor(context: ImageContext) {
    this.#context = context;
  }

  /**
   * A host that reads the image wants its multicast. `mtuBytes`: what gets through to all hosts; 0: unknown. One that
   * has begun goes on as it is: a host that cannot take part in it reads.
   */
  async join(image: string, reader: string, provider: MulticastProvider, mtuBytes: number): Promise<MulticastOffer> {
    const { images, host } = this.#context;
    const { state, readers = [] } = images.get(image);
    if (!readers.includes(reader)) {
      throw new MigrationError('CONFLICT', `${reader} does not read image ${image} of ${host}`);
    }
    if (state === 'capturing' || state === 'filling') return { state: 'wait' };
    if (state !== 'complete') return { state: 'over' };
    const seen = this.#multicasts.get(image);
    const before = await seen?.catch(() => null);
    // Another host has begun one meanwhile: a second would send every page again.
    if (this.#multicasts.get(image) !== seen && this.#multicasts.has(image)) {
      return this.join(image, reader, provider, mtuBytes);
    }
    // A host that has been in it gets the rest by reading. For others it was the multicast of an earlier fork.
    if (before?.isOver === true && before.has(reader)) return { state: 'over' };
    const multicast = before?.isOver === false ? before : await this.#open(image, provider, mtuBytes);
    return multicast.join(reader, readers);
  }

  async sent(image: string): Promise<MulticastSent> {
    const multicast = await this.#multicasts.get(image)?.catch(() => null);
    return { sentBytes: multicast?.sentBytes ?? this.#sentBytes.get(image) ?? 0 };
  }

  /** The host reads the image no more. If it ever does so again, it is a new one. */
  async forget(image: string, reader: string): Promise<void> {
    (await this.#multicasts.get(image)?.catch(() => null))?.forget(reader);
  }

  async close(image: string): Promise<void> {
    const multicast = this.#multicasts.get(image);
    this.#multicasts.delete(image);
    const closing = (await multicast?.catch(() => null)) ?? null;
    if (closing === null) return;
    this.#sentBytes.delete(image);
    this.#sentBytes.set(image, closing.sentBytes);
    const [oldest] = this.#sentBytes.keys();
    if (this.#sentBytes.size > REMEMBERED_MAX && oldest !== undefined) this.#sentBytes.delete(oldest);
    await closing.close();
  }

  async closeAll(): Promise<void> {
    await Promise.all([...this.#multicasts.keys()].map((image) => this.close(image)));
  }

  #open(image: string, provider: MulticastProvider, mtuBytes: number): Promise<ImageMulticast> {
    const opening = ImageMulticast.open(this.#context, image, newGroup(this.#context.multicast, provider, mtuBytes));
    this.#multicasts.set(image, opening);
    opening.catch((error: unknown) => {
      if (this.#multicasts.get(image) === opening) this.#multicasts.delete(image);
      this.#context.log.warn({ image, err: toMigrationError(error) }, 'an image cannot be sent as a multicast');
    });
    return opening;
  }
}

/** One multicast, from its first host to its end. */
class ImageMulticast {
  readonly #context: ImageContext;
  readonly #image: string;
  readonly #group: MulticastGroup;
  readonly #sender: MulticastSenderHandle;
  /** The number of each host. A host that comes again gets a new one, because numbers must not be used twice. */
  readonly #members = new Map<string, number>();
  #memberCount = 0;
  /** Aborted: nobody waits for more hosts. */
  readonly #waiting = new AbortController();
  #isWaiting = false;
  #isStarted = false;
  #isOver = false;
  #sentBytes = 0;

  private constructor(context: ImageContext, image: string, group: MulticastGroup, sender: MulticastSenderHandle) {
    this.#context = context;
    this.#image = image;
    this.#group = group;
    this.#sender = sender;
  }

  static async open(context: ImageContext, image: string, group: MulticastGroup): Promise<ImageMulticast> {
    const { images, native } = context;
    const interfaceAddress = await interfaceOf(context, group.provider);
    const regions = await images.regions(images.get(image));
    let multicast: ImageMulticast | null = null;
    const sender = await native.openMulticastSender({
      ...{ image: regions, group: { ...group, interfaceAddress } },
      order: await images.touchOrder(image),
      bandwidthBytesPerS: context.multicast.bandwidthBytesPerS,
      onEdge: () => multicast?.look(),
    });
    multicast = new ImageMulticast(context, image, group, sender);
    return multicast;
  }

  get isOver(): boolean {
    return this.#isOver;
  }

  get sentBytes(): number {
    this.look();
    return this.#sentBytes;
  }

  has(reader: string): boolean {
    return this.#members.has(reader);
  }

  forget(reader: string): void {
    this.#members.delete(reader);
  }

  /** `readers`: all hosts that read the image. It begins when all of them are there, or soon. */
  join(reader: string, readers: readonly string[]): MulticastOffer {
    this.look();
    if (this.#isOver) return { state: 'over' };
    this.#memberCount++;
    this.#members.set(reader, this.#memberCount);
    if (readers.every((other) => this.#members.has(other))) this.#start();
    else if (!this.#isWaiting) void this.#startLater();
    const seat = { group: this.#group, member: this.#memberCount };
    return { state: 'joined', seat };
  }

  /** Reads what the native side has done. */
  look(): void {
    if (this.#isOver) return;
    const { state, failure, counters } = this.#sender.snapshot();
    this.#sentBytes = Number(counters.sentBytes);
    if (state !== 'ended' && state !== 'failed' && state !== 'closed') return;
    this.#isOver = true;
    const fields = { image: this.#image, hosts: this.#members.size, sentBytes: this.#sentBytes };
    if (failure === null) this.#context.log.info(fields, 'an image has been sent as a multicast');
    else {
      const err = failureToError(failure, 'sending the image');
      this.#context.log.warn({ ...fields, err }, 'a multicast has ended early: the hosts get the rest by reading');
    }
    void this.close();
  }

  async close(): Promise<void> {
    this.#isOver = true;
    this.#waiting.abort();
    await this.#sender.close().catch((error: unknown) => {
      this.#context.log.error({ image: this.#image, err: toMigrationError(error) }, 'a multicast is still being sent');
    });
  }

  async #startLater(): Promise<void> {
    this.#isWaiting = true;
    await this.#context.clock.sleep(JOIN_MS_MAX, this.#waiting.signal).catch(() => undefined);
    this.#start();
  }

  #start(): void {
    if (this.#isStarted || this.#isOver) return;
    this.#isStarted = true;
    this.#waiting.abort();
    this.#sender.start();
  }
}

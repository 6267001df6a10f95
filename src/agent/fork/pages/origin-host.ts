/** The host that has the image, as a host sees it that reads the image from there. */
import { raised } from '../../../domain/data-security.js';
import { toMigrationError } from '../../../domain/errors.js';
import type { MulticastProvider } from '../../../domain/fanout.js';
import type { Transport } from '../../../domain/transport.js';
import type { DigestsHash, MulticastOffer } from '../../../engine/ports/fanout.js';
import type { ForkOrigin, ImageHolder } from '../../../engine/ports/fork.js';
import { inTime } from '../../../kit/in-time.js';
import type { TouchOrder } from '../../../native/types.js';
import type { ImageContext } from '../../image/context.js';
import { refuseOtherDisks } from '../../image/join-disks.js';
import { decodeTouchOrder, NO_ORDER } from '../../image/touch-order.js';
import { rootRemoved } from './failed-image.js';
import { ANY_HOLDER_TRANSPORT } from './image-server.js';

/** Asking again is cheap: the host continues with what it has begun for an earlier question. */
const ASK_MS_MAX = 5_000;
/** Pages that nobody waits for are not read before the answer. */
const ORDER_MS_MAX = 1_000;

type Origin = Pick<ForkOrigin, 'host' | 'image' | 'dataSecurity'>;

export class OriginHost {
  readonly #context: ImageContext;
  readonly #origin: Origin;
  /** How the pages are to come. The host may name another transport for the time being. */
  transport: Transport;

  constructor(context: ImageContext, origin: Origin, transport?: Transport) {
    this.#context = context;
    this.#origin = origin;
    // A coordinator that has not named one yet will do so. Meanwhile clones may wait.
    this.transport = transport ?? ANY_HOLDER_TRANSPORT;
  }

  /** Asks for a holder as long as that takes: a device may have to register the memory first. */
  async serveImage(): Promise<ImageHolder> {
    const { peers, host, images } = this.#context;
    const { image } = this.#origin;
    if (!peers.isPeer(this.#origin.host)) throw rootRemoved(image, this.#origin.host);
    const holder = await peers.agent(this.#origin.host).forks.serveImage(image, host, this.transport);
    refuseOtherDisks(images.get(image), holder.disks);
    return this.raised(holder);
  }

  /** The holder with the protection that the fork asks for at least. */
  raised<Holder extends Pick<ImageHolder, 'endpoint'>>(holder: Holder): Holder {
    return { ...holder, endpoint: raised(holder.endpoint, this.#origin.dataSecurity) };
  }

  /** The same for an attempt of many: a host that is silent must not keep the next one from being made. */
  findHolder(): Promise<ImageHolder> {
    return this.#within(() => this.serveImage());
  }

  /** Asks for digests of pages, as DigestServer answers. The host may compute them first. */
  digests(regionIndex: number, firstPage: number): Promise<string | null> {
    const { peers, host: self } = this.#context;
    const { host, image } = this.#origin;
    return this.#within(async () => {
      const { digests } = await peers.agent(host).forks.imageDigests(image, self, regionIndex, firstPage);
      return digests;
    });
  }

  /** Asks what clones have touched first, there and before. Never rejects: it is worth no more than a moment. */
  async touchOrder(): Promise<TouchOrder> {
    const { peers, host: self, images, log } = this.#context;
    const { host, image } = this.#origin;
    try {
      const { order } = await inTime(host, ORDER_MS_MAX, peers.agent(host).fanout.touchOrder(image, self));
      if (order === '') return NO_ORDER;
      const decoded = decodeTouchOrder(images.get(image).spec.memory, Buffer.from(order, 'base64'));
      if (decoded === null) log.warn({ image, host }, 'a host sends no order of touches of its image: it is not used');
      return decoded ?? NO_ORDER;
    } catch (error) {
      log.debug({ image, host, err: toMigrationError(error) }, 'the order of touches of an image is not known');
      return NO_ORDER;
    }
  }

  /** Asks what they hash to. */
  digestsHash(regionIndex: number, firstPage: number): Promise<DigestsHash> {
    const { peers, host: self } = this.#context;
    const { host, image } = this.#origin;
    return this.#within(() => peers.agent(host).fanout.digestsHash(image, self, regionIndex, firstPage));
  }

  /** Asks for a seat in the multicast of the image. */
  joinMulticast(provider: MulticastProvider, datagramBytesMax: number): Promise<MulticastOffer> {
    const { peers, host: self } = this.#context;
    const { host, image } = this.#origin;
    return this.#within(() => peers.agent(host).fanout.joinMulticast(image, self, provider, datagramBytesMax));
  }

  /** Tells the host that nobody reads the image here any more. Never rejects: a person can overrule a reader. */
  async end(): Promise<void> {
    const { peers, host: self, log } = this.#context;
    const { host, image } = this.#origin;
    await this.#within(() => peers.agent(host).forks.endImage(image, self)).catch((error: unknown) => {
      log.debug({ image, host, err: toMigrationError(error) }, 'the host of an image does not hear of its reader');
    });
  }

  #within<T>(call: () => Promise<T>): Promise<T> {
    return inTime(this.#origin.host, ASK_MS_MAX, call(), this.#context.clock);
  }
}

/** Implements FanoutPort on this host. */
import { toMigrationError } from '../../../domain/errors.js';
import type { HeardProbe, MulticastGroup, MulticastProvider, RoundTrip } from '../../../domain/fanout.js';
import type { Transport } from '../../../domain/transport.js';
import type { DigestsHash, FanoutPort, MulticastOffer, MulticastSent } from '../../../engine/ports/fanout.js';
import type { ImageDigests, ImageHolder } from '../../../engine/ports/fork.js';
import { inTime } from '../../../kit/in-time.js';
import { inParallel } from '../../../kit/parallel.js';
import { CONSTANTS } from '../../../protocol/wire.js';
import type { ImageContext } from '../../image/context.js';
import { checkImageId } from '../../image/record.js';
import { hashOf } from './digest-reader.js';
import type { ImagePages } from './image-server.js';
import type { ImageServers } from './image-servers.js';
import { interfaceOf, newGroup } from './multicast-server.js';

/** How much longer than a host listens the root sends, for those that begin late. It ends when all have answered. */
const CALL_MS = 5_000;

/** The first opens the connection. */
const ECHOES = 4;
const ECHO_MS_MAX = 1_000;
const HOSTS_AT_ONCE = 8;
/** Cables are seldom moved. */
const ROUND_TRIP_KEPT_MS = 600_000;

export interface FanoutAgentOptions {
  readonly servers: ImageServers;
  /** Where the pages of an image are that this host has, or is about to have. Throws if there are none to be read. */
  readonly held: (image: string) => ImagePages;
}

export class FanoutAgent implements FanoutPort {
  readonly #context: ImageContext;
  readonly #options: FanoutAgentOptions;
  readonly #roundTrips = new Map<string, { readonly us: number; readonly atMs: number }>();

  constructor(context: ImageContext, options: FanoutAgentOptions) {
    this.#context = context;
    this.#options = options;
  }

  async serveHeld(image: string, reader: string, transport: Transport): Promise<ImageHolder> {
    checkImageId(image);
    return this.#options.servers.serveHeld(image, reader, transport, this.#options.held(image));
  }

  async heldDigests(image: string, region: number, firstPage: number): Promise<ImageDigests> {
    checkImageId(image);
    const digests = await this.#options.servers.heldDigests(image, region, firstPage);
    return { digests: digests?.toString('base64') ?? null };
  }

  async digestsHash(image: string, reader: string, region: number, firstPage: number): Promise<DigestsHash> {
    checkImageId(image);
    await this.#context.inject.hit('agent:fork:digests');
    const digests = await this.#options.servers.digests(image, reader, region, firstPage);
    const isKnown = digests !== null && digests.length > 0;
    return {
      pageCount: digests === null ? null : digests.length / CONSTANTS.DIGEST_BYTES,
      sha256: isKnown ? hashOf(digests) : '',
    };
  }

  async joinMulticast(
    image: string,
    reader: string,
    provider: MulticastProvider,
    datagramBytesMax: number,
  ): Promise<MulticastOffer> {
    checkImageId(image);
    await this.#context.inject.hit('agent:fork:multicast');
    return this.#options.servers.multicasts.join(image, reader, provider, datagramBytesMax);
  }

  async touchOrder(image: string, reader: string): Promise<{ readonly order: string }> {
    checkImageId(image);
    return { order: await this.#options.servers.touchOrder(image, reader) };
  }

  async multicastSent(image: string): Promise<MulticastSent> {
    checkImageId(image);
    return this.#options.servers.multicasts.sent(image);
  }

  /** A host that cannot be asked has heard nothing. */
  async probeMulticast(
    hosts: readonly string[],
    hearMs: number,
    provider: MulticastProvider,
  ): Promise<readonly HeardProbe[]> {
    const { native, peers, log, multicast } = this.#context;
    const group = newGroup(multicast, provider, 0);
    const interfaceAddress = await interfaceOf(this.#context, provider);
    const done = new AbortController();
    const sending = native
      .sendMulticastProbe({ ...group, interfaceAddress }, hearMs + CALL_MS, done.signal)
      .catch((error: unknown) => {
        log.warn({ group: group.group, err: toMigrationError(error) }, 'no datagram can be sent to a group');
      });
    const heard = await Promise.all(
      hosts.map(async (host): Promise<HeardProbe> => {
        try {
          return { host, ...(await peers.agent(host).fanout.hearMulticast(group, hearMs)) };
        } catch (thrown) {
          log.debug({ host, err: toMigrationError(thrown) }, 'a host cannot listen for a multicast');
          return { host, largestBytes: 0 };
        }
      }),
    );
    done.abort();
    await sending;
    return heard;
  }

  async roundTrips(hosts: readonly string[]): Promise<readonly RoundTrip[]> {
    const outcomes = await inParallel(hosts, HOSTS_AT_ONCE, (host) => this.#roundTrip(host));
    return outcomes.map((outcome, index) => ({
      host: hosts[index] ?? '',
      us: 'value' in outcome ? outcome.value : null,
    }));
  }

  async #roundTrip(host: string): Promise<number> {
    const { clock, peers } = this.#context;
    const known = this.#roundTrips.get(host);
    if (known !== undefined && clock.nowMs() - known.atMs < ROUND_TRIP_KEPT_MS) return known.us;
    const { fanout } = peers.agent(host);
    let us = Number.POSITIVE_INFINITY;
    for (let n = 0; n < ECHOES; n++) {
      const beganAtMs = clock.nowMs();
      await inTime(host, ECHO_MS_MAX, fanout.echo(), clock);
      us = Math.min(us, Math.round((clock.nowMs() - beganAtMs) * 1_000));
    }
    this.#roundTrips.set(host, { us, atMs: clock.nowMs() });
    return us;
  }

  async echo(): Promise<void> {}

  async hearMulticast(group: MulticastGroup, hearMs: number): Promise<{ readonly largestBytes: number }> {
    const interfaceAddress = await interfaceOf(this.#context, group.provider);
    return this.#context.native.receiveMulticastProbe({ ...group, interfaceAddress }, hearMs);
  }
}

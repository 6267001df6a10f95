/**
 * The calls by which an image gets to many hosts. The rules are in host.ts. What a host that joins a fork must have in
 * any case, it has by the calls of fork.ts: those here make it faster, and a host whose calls fail reads from the root.
 */
import type { HeardProbe, MulticastGroup, MulticastProvider, RoundTrip } from '../../domain/fanout.js';
import type { Transport } from '../../domain/transport.js';
import type { ImageDigests, ImageHolder } from './fork.js';

/** What a host needs to receive the multicast of an image. */
export interface MulticastSeat {
  readonly group: MulticastGroup;
  /** The number of the host in the group. No two seats of a group have the same. */
  readonly member: number;
}

/** wait: ask again soon, because the image is not complete there yet. over: there is nothing to receive any more. */
export type MulticastOffer =
  | { readonly state: 'wait' | 'over' }
  | { readonly state: 'joined'; readonly seat: MulticastSeat };

/** What the root has sent as a multicast of an image, so far. */
export interface MulticastSent {
  readonly sentBytes: number;
}

/**
 * What a piece of the digests of an image hashes to, so that the piece itself may come from anybody. `pageCount`: of so
 * many pages; 0: none are known yet; null: they never will be. `sha256`: in hex; empty if there are none.
 */
export interface DigestsHash {
  readonly pageCount: number | null;
  readonly sha256: string;
}

export interface FanoutPort {
  /**
   * On a host that reads the image: the host `reader` may read the pages that are here. It is told which they are, and
   * gets the others elsewhere. It does not count as a reader: nothing here waits for it. Throws CONFLICT while
   * no page is here.
   */
  serveHeld(image: string, reader: string, transport: Transport): Promise<ImageHolder>;
  /** On a host that reads the image: digests that it was told, as `imageDigests`. It computes none. */
  heldDigests(image: string, region: number, firstPage: number): Promise<ImageDigests>;
  /** On the host that has the image, for one of its readers: what `imageDigests` would answer hashes to. */
  digestsHash(image: string, reader: string, region: number, firstPage: number): Promise<DigestsHash>;
  /**
   * On the host that has the image: the host `reader`, one of its readers, wants to receive its multicast.
   * `provider` and `datagramBytesMax`: by which all hosts are reached, and the largest datagrams that get to them; 0:
   * unknown. The first host of a multicast determines both.
   */
  joinMulticast(
    image: string,
    reader: string,
    provider: MulticastProvider,
    datagramBytesMax: number,
  ): Promise<MulticastOffer>;
  /**
   * On the host that has the image, for one of its readers: the order in which clones have touched its memory so far
   * (agent/image/touch-order.ts), in base64; empty if it is not known. A hint.
   */
  touchOrder(image: string, reader: string): Promise<{ readonly order: string }>;
  /** On the host that has the image. */
  multicastSent(image: string): Promise<MulticastSent>;
  /**
   * Tries whether datagrams of this host to a group get to these hosts within `hearMs`. Rejects for no host, but with
   * UNSUPPORTED if this host does not have the provider.
   */
  probeMulticast(hosts: readonly string[], hearMs: number, provider: MulticastProvider): Promise<readonly HeardProbe[]>;
  /** Measures how far these hosts are from this one. Bounded in time, and rejects for no host. */
  roundTrips(hosts: readonly string[]): Promise<readonly RoundTrip[]>;
  /** Answers, and nothing else: for `roundTrips`. */
  echo(): Promise<void>;
  /** Waits for the datagrams of a probe. Resolves at the first ones, or after `hearMs`. */
  hearMulticast(group: MulticastGroup, hearMs: number): Promise<{ readonly largestBytes: number }>;
}

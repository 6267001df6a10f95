/**
 * Gets the digests of an image for a host that reads it. The host of the image says what a piece of them hashes to, in
 * a few bytes; the piece itself comes from a relay that has it already, so that digests for many hosts do not fill the
 * link of the root. What a relay says is compared, so it can keep digests back, and not change them.
 */
import { createHash } from 'node:crypto';
import { toMigrationError } from '../../../domain/errors.js';
import type { DigestsHash } from '../../../engine/ports/fanout.js';
import { inTime } from '../../../kit/in-time.js';
import type { ImageContext } from '../../image/context.js';
import { pieceOf } from './digest-server.js';

const ASK_MS_MAX = 2_000;
/**
 * After so many questions in a row that no relay could answer, each followed by a pause, the root is asked for this
 * piece and all others: an image of a terabyte has 16 384 pieces, and must not wait for each.
 */
const PATIENCE = 4;

export interface DigestReaderOptions {
  readonly image: string;
  /** The nearest first. */
  readonly relays: readonly string[];
  /** Asks the host of the image, as DigestServer answers. */
  readonly origin: {
    digests(regionIndex: number, firstPage: number): Promise<string | null>;
    digestsHash(regionIndex: number, firstPage: number): Promise<DigestsHash>;
  };
}

export class DigestReader {
  readonly #context: Pick<ImageContext, 'host' | 'peers' | 'log'>;
  readonly #options: DigestReaderOptions;
  /** Without those that are of no use: they have said something wrong, or never will have any. */
  #relays: readonly string[];
  #misses = 0;

  constructor(context: Pick<ImageContext, 'host' | 'peers' | 'log'>, options: DigestReaderOptions) {
    this.#context = context;
    this.#options = options;
    this.#relays = options.relays.filter((host) => host !== context.host && context.peers.isPeer(host));
  }

  /** Returns digests from `firstPage` on, in base64; '': none are known yet; null: they never will be. */
  async ask(regionIndex: number, firstPage: number): Promise<string | null> {
    const { origin } = this.#options;
    if (this.#relays.length === 0) return origin.digests(regionIndex, firstPage);
    const { pageCount, sha256 } = await origin.digestsHash(regionIndex, firstPage);
    if (pageCount === null) return null;
    if (pageCount === 0) return '';
    for (const relay of this.#relays) {
      const piece = await this.#askRelay(relay, regionIndex, firstPage);
      if (piece === null) this.#drop(relay);
      const digests = pieceOf(Buffer.from(piece ?? '', 'base64'), pageCount);
      if (digests === null) continue;
      if (hashOf(digests) === sha256) {
        this.#misses = 0;
        return digests.toString('base64');
      }
      this.#context.log.warn({ image: this.#options.image, host: relay }, 'a relay has other digests than the root');
      this.#drop(relay);
    }
    if (++this.#misses < PATIENCE && this.#relays.length > 0) return '';
    this.#relays = [];
    return origin.digests(regionIndex, firstPage);
  }

  #drop(relay: string): void {
    this.#relays = this.#relays.filter((host) => host !== relay);
  }

  /** Returns '' if it has none yet, or does not answer; null if it never will have any. */
  async #askRelay(relay: string, regionIndex: number, firstPage: number): Promise<string | null> {
    const { image } = this.#options;
    const { peers, log } = this.#context;
    try {
      const asking = peers.agent(relay).fanout.heldDigests(image, regionIndex, firstPage);
      return (await inTime(relay, ASK_MS_MAX, asking)).digests;
    } catch (thrown) {
      log.debug({ image, host: relay, err: toMigrationError(thrown) }, 'a relay does not tell its digests');
      return '';
    }
  }
}

export function hashOf(digests: Buffer): string {
  return createHash('sha256').update(digests).digest('hex');
}

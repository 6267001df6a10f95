/** Hosts that are asked for pages of an image before the one that has all of them. */
import type { NativeFailure } from './basic-types.js';

export interface NearPlace {
  /** From 0 to 2^32 - 1. */
  readonly id: number;
  /** 0 is nearest; up to 255. */
  readonly level: number;
}

export interface NearSnapshot extends NearPlace {
  readonly isConnected: boolean;
  /** Of the pages that it has brought. */
  readonly bytes: bigint;
  /**
   * Why it is not connected any more: the connection was lost, no answer came for a second (TIMEOUT), it broke the
   * protocol, or sent pages that are not what their digests say (DAMAGED).
   */
  readonly failure: NativeFailure | null;
}

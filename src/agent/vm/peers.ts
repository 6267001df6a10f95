/**
 * The other hosts as an agent sees them. src/api/peers/client.ts speaks to them over mutual TLS; tests join agents of
 * one process.
 */
import type { Readable } from 'node:stream';

export interface Peers {
  /**
   * The device state of a session to its target; NOT_FOUND if no such host is configured. Resolves when the target's
   * QEMU has loaded all of it. The stream begins before the source has stopped and pauses in between; it is destroyed
   * when this rejects.
   */
  sendState(host: string, session: string, body: Readable): Promise<void>;
  /** Opens the connection that sendState will use. */
  warm(host: string): Promise<void>;
}

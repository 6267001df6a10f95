/**
 * The other hosts as an agent sees them. src/api/peers/client.ts talks to them over mutual TLS. Tests connect agents
 * within one process.
 */
import type { Duplex, Readable } from 'node:stream';
import type { LoadClonesReply } from '../../engine/ports/fork.js';
import type { HostPort } from '../../engine/ports/host.js';

export interface Peers {
  /** Throws NOT_FOUND if no such host is configured. */
  agent(host: string): HostPort;
  /** True if that host is configured, or is this host. It says nothing about whether it answers. */
  isPeer(host: string): boolean;
  /**
   * Sends the device state of a session to its target. Resolves when the target's QEMU has loaded all of it. The stream
   * begins before the source VM is stopped, and pauses in between. If the call rejects, it destroys the stream. Throws
   * NOT_FOUND if no such host is configured.
   */
  sendState(host: string, session: string, body: Readable): Promise<void>;
  /** Sends the device state of a fork to a host that joins it. Resolves when its clones there have loaded it. */
  sendForkState(host: string, fork: string, body: Readable): Promise<LoadClonesReply>;
  /**
   * Opens a connection to a disk of an image of that host, as the guest sees it. The protocol is that of the back end's
   * exports. Throws NOT_FOUND if the host has no such image or disk.
   */
  openDisk(host: string, image: string, disk: string): Promise<Duplex>;
  /**
   * Opens a connection to the QEMU that waits for this session, for QEMU's own migration. Throws CONFLICT if none
   * waits.
   */
  openStream(host: string, session: string): Promise<Duplex>;
  /** Opens the connection that sendState will use. */
  warm(host: string): Promise<void>;
}

/**
 * Serial output of VMs as bodies of answers. Few are open at a time. Each is sent as fast as its reader takes it, and a
 * reader that takes nothing for long is cut off. A body that ends early is an error for its reader, so it is never
 * taken for a whole one.
 */
import type { Duplex, Readable } from 'node:stream';
import type { FastifyReply } from 'fastify';
import { MigrationError } from '../../domain/errors.js';
import type { ApiVms } from './ports.js';

const OPEN_MAX = 32;
const SILENT_MS = 60_000;
const OCTETS = 'application/octet-stream';

/** Opens all serial output that this host keeps of a VM. */
export function openSerialLog(vms: ApiVms, name: string): Promise<Duplex> {
  return vms.openConsole(name, { backlogBytes: Number.MAX_SAFE_INTEGER, isFollowing: false });
}

export class SerialLogs {
  #openCount = 0;

  /** Sends what `open` returns. Throws CONFLICT if too many are being sent. */
  async send(reply: FastifyReply, open: () => Promise<Readable>): Promise<FastifyReply> {
    if (this.#openCount >= OPEN_MAX)
      throw new MigrationError('CONFLICT', `${OPEN_MAX} serial logs are being read, and there may be no more`, {
        remedy: 'try again when some of the "vfork --wait --logs" that run have ended',
        isRetryable: true,
      });
    this.#openCount++;
    const log = await open().catch((error: unknown) => {
      this.#openCount--;
      throw error;
    });
    log.once('close', () => this.#openCount--);
    if (reply.raw.destroyed) {
      log.destroy();
      throw new MigrationError('DISCONNECTED', 'the reader of a serial log has gone away');
    }
    reply.raw.setTimeout(SILENT_MS, () => reply.raw.destroy());
    return reply.type(OCTETS).send(log);
  }
}

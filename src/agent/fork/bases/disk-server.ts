/**
 * Serves the disks of this host's images to hosts that joined their forks and do not see the files. A process of the
 * back end reads the files (`DiskExports`); this class says who may connect to it, and when.
 *
 *   parent writes to the disk      the clones' processes are started, and read what they like: none of it counts
 *   fork point                     that process is killed, and with it all connections
 *   nobody writes to the disk      a new process opens the files as they are now; the clones connect again, and run
 *   files are merged or removed    nobody is served
 *
 * A process runs as long as a host is connected, and ends with the daemon. The hosts connect again to the next one.
 */
import { chmod, mkdir, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import type { DiskExport } from '../../../backends/disk-export.js';
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import { KeyedLocks } from '../../../kit/locks.js';
import type { ImageContext } from '../../image/context.js';
import { checkLayers } from '../../image/layers.js';
import { checkImageId, type ImageRecord } from '../../image/record.js';

/** A host that has lost its connections is back before that. */
const IDLE_MS = 2_000;

interface Served {
  readonly process: DiskExport;
  readonly isFixed: boolean;
  readonly connections: Set<Duplex>;
  idle: NodeJS.Timeout | null;
}

export type DiskServerContext = Pick<ImageContext, 'images' | 'vms' | 'log' | 'host'>;

export class DiskServer {
  readonly #context: DiskServerContext;
  readonly #directory: string;
  readonly #locks = new KeyedLocks();
  readonly #served = new Map<string, Served>();
  #isClosed = false;

  constructor(context: DiskServerContext, stateDir: string) {
    this.#context = context;
    this.#directory = join(stateDir, 'disk-server');
  }

  /** Ends what an earlier daemon has left. */
  async start(): Promise<void> {
    await mkdir(this.#directory, { recursive: true, mode: 0o700 });
    await chmod(this.#directory, 0o700);
    const { images, vms } = this.#context;
    // One that was just being started has no socket yet.
    const read = images.all().flatMap(({ id, servedTo }) => (servedTo === undefined ? [] : [this.#socketOf(id)]));
    const left = (await readdir(this.#directory)).map((name) => join(this.#directory, name));
    for (const path of new Set([...read, ...left])) await vms.backend.diskExports.endLeftover(path);
  }

  /**
   * Connects `reader` to a disk of the image. The image's record names that host from then on, so that the disk stays
   * as long as the host needs it. Throws NOT_FOUND if this host does not have the image or the disk, DISK_CHANGED if
   * the disk is not that of the image's moment any more.
   */
  open(image: string, disk: string, reader: string): Promise<Duplex> {
    checkImageId(image);
    return this.#locks.hold(image, async () => {
      const { images, host } = this.#context;
      if (this.#isClosed) throw new MigrationError('CANCELLED', 'the daemon is closing');
      const record = images.get(image);
      const isOwn = record.served === undefined && record.disks.some(({ id }) => id === disk);
      if (!isOwn) throw new MigrationError('NOT_FOUND', `${host} has no disk ${disk} of image ${image}`);
      const { servedTo = [] } = record;
      if (!servedTo.includes(reader)) await images.update(image, { servedTo: [...servedTo, reader] });
      const served = this.#served.get(image) ?? (await this.#serve(record));
      try {
        return this.#keep(image, served, await served.process.connect());
      } catch (error) {
        await this.#end(image);
        throw error;
      }
    });
  }

  /** The fork point has been taken. When it resolves, nobody reads what the disks were before any more. */
  fix(image: string): Promise<void> {
    return this.#locks.hold(image, async () => {
      if (this.#served.get(image)?.isFixed === false) await this.#end(image);
    });
  }

  /** Runs `work`, which changes the files, while nobody reads them. Who asks meanwhile waits. */
  whileUnserved<T>(image: string, work: () => Promise<T>): Promise<T> {
    return this.#locks.hold(image, async () => {
      await this.#end(image);
      return work();
    });
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    for (const image of [...this.#served.keys()]) await this.#locks.hold(image, () => this.#end(image));
  }

  #socketOf(image: string): string {
    return join(this.#directory, `${image}.sock`);
  }

  async #serve(record: ImageRecord): Promise<Served> {
    const { vms, log } = this.#context;
    const isFixed = hasForkPoint(record);
    if (isFixed) await refuseChanged(record);
    const socketPath = this.#socketOf(record.id);
    const process = await vms.backend.diskExports.serve({ socketPath, disks: record.disks, isFixed });
    const served: Served = { process, isFixed, connections: new Set(), idle: null };
    this.#served.set(record.id, served);
    void process.exited.then(() => {
      if (this.#served.get(record.id) !== served) return;
      this.#served.delete(record.id);
      log.warn({ image: record.id }, 'the process that serves the disks of an image has ended');
    });
    return served;
  }

  #keep(image: string, served: Served, connection: Duplex): Duplex {
    if (served.idle !== null) clearTimeout(served.idle);
    served.idle = null;
    served.connections.add(connection);
    // It may break before the caller listens. The close follows.
    connection.on('error', () => connection.destroy());
    connection.once('close', () => {
      served.connections.delete(connection);
      if (served.connections.size > 0 || this.#served.get(image) !== served) return;
      served.idle = setTimeout(() => this.#endIfIdle(image, served), IDLE_MS);
      served.idle.unref();
    });
    return connection;
  }

  #endIfIdle(image: string, served: Served): void {
    const ending = this.#locks.hold(image, async () => {
      if (this.#served.get(image) === served && served.connections.size === 0) await this.#end(image);
    });
    ending.catch((error: unknown) => {
      this.#context.log.warn({ image, err: toMigrationError(error) }, 'the disks of an image are still served');
    });
  }

  async #end(image: string): Promise<void> {
    const served = this.#served.get(image);
    if (served === undefined) return;
    this.#served.delete(image);
    if (served.idle !== null) clearTimeout(served.idle);
    await served.process.end();
    for (const connection of served.connections) connection.destroy();
  }
}

/** The parent has left its disks, so they do not change any more. */
function hasForkPoint({ state, deviceStateBytes }: ImageRecord): boolean {
  return state !== 'capturing' || deviceStateBytes > 0;
}

async function refuseChanged({ id, layers = [] }: ImageRecord): Promise<void> {
  const { problem } = await checkLayers(layers);
  if (problem === null) return;
  throw new MigrationError('DISK_CHANGED', `the disks of image ${id} are not served: ${problem.reason}`, {
    remedy: `put the disk's files back as they were, or remove the image: "vmctl image rm ${id}"`,
  });
}

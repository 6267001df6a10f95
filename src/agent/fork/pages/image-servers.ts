/**
 * The images of this host that other hosts read. Serving belongs to the image: it outlives the fork that has taken the
 * image, and a restart of the daemon, after which the readers ask again. A reader is known, durably, from its first
 * question until it says that it needs the image no more, so that nobody removes the image below it.
 */
import { MigrationError } from '../../../domain/errors.js';
import type { Transport } from '../../../domain/transport.js';
import type { ImageHolder } from '../../../engine/ports/fork.js';
import type { ImageContext } from '../../image/context.js';
import { encodeTouchOrder } from '../../image/touch-order.js';
import { DigestServer } from './digest-server.js';
import { type ImagePages, ImageServer } from './image-server.js';
import { MulticastServer } from './multicast-server.js';

export class ImageServers {
  readonly #context: ImageContext;
  readonly #servers = new Map<string, ImageServer>();
  readonly #digests: DigestServer;
  readonly multicasts: MulticastServer;
  /** The images that are being removed. */
  readonly #leaving = new Set<string>();
  #isClosed = false;

  constructor(context: ImageContext) {
    this.#context = context;
    this.#digests = new DigestServer(context);
    this.multicasts = new MulticastServer(context);
  }

  /** Tells a reader the digests of pages, as DigestServer does. Throws CONFLICT for a host that does not read it. */
  async digests(image: string, reader: string, regionIndex: number, firstPage: number): Promise<Buffer | null> {
    this.#refuseLeaving(image);
    this.#refuseStranger(image, reader);
    return this.#digests.digests(image, regionIndex, firstPage);
  }

  /** What this host was told itself. Throws CONFLICT if the image is its own, of which only readers are told. */
  async heldDigests(image: string, regionIndex: number, firstPage: number): Promise<Buffer | null> {
    const { images, host } = this.#context;
    this.#refuseLeaving(image);
    if (images.get(image).isChecked === undefined) {
      throw new MigrationError('CONFLICT', `${host} has image ${image} itself`);
    }
    return this.#digests.digests(image, regionIndex, firstPage);
  }

  /** Tells a reader the order in which clones have touched the image, in base64. Empty: none is known. */
  async touchOrder(image: string, reader: string): Promise<string> {
    const { images } = this.#context;
    this.#refuseStranger(image, reader);
    const order = await images.touchOrder(image);
    return order.length === 0 ? '' : encodeTouchOrder(images.get(image).spec.memory, order).toString('base64');
  }

  /** The pages of this host for one that does not depend on it. */
  async serveHeld(image: string, reader: string, transport: Transport, pages: ImagePages): Promise<ImageHolder> {
    const { host } = this.#context;
    this.#refuseLeaving(image);
    if (reader === host) throw new MigrationError('USAGE', `${host} has image ${image} itself`);
    return this.#serverOf(image).serveHeld(transport, pages);
  }

  async serve(image: string, reader: string, transport: Transport, pages: ImagePages): Promise<ImageHolder> {
    const { images, host } = this.#context;
    this.#refuseLeaving(image);
    if (reader === host) throw new MigrationError('USAGE', `${host} has image ${image} itself`);
    const { readers = [] } = images.get(image);
    const holder = this.#serverOf(image).serve(transport, pages);
    const noting = readers.includes(reader) ? null : images.update(image, { readers: [...readers, reader] });
    await Promise.allSettled([holder, noting]);
    await noting;
    return holder;
  }

  /** The host reads the image no more. Idempotent. */
  async end(image: string, reader: string): Promise<void> {
    const { images } = this.#context;
    if (!images.has(image)) return this.close(image);
    const { readers = [], ...record } = images.get(image);
    const others = readers.filter((other) => other !== reader);
    if (others.length === readers.length) return;
    void this.multicasts.forget(image, reader);
    const saving = images.replace(image, others.length === 0 ? record : { ...record, readers: others });
    if (others.length === 0) await this.close(image);
    await saving;
  }

  /** The fork point has been taken. */
  async fix(image: string): Promise<void> {
    await this.#servers.get(image)?.fix();
  }

  /** What serves the image while it is filled must end before what fills it. */
  async endFilling(image: string): Promise<void> {
    await this.#servers.get(image)?.endFilling();
  }

  /** Closes all sessions of the image. Its readers lose their connection, and ask again. */
  async close(image: string): Promise<void> {
    const server = this.#servers.get(image);
    this.#servers.delete(image);
    await Promise.all([server?.close(), this.#digests.close(image), this.multicasts.close(image)]);
  }

  /** The same, and nobody begins to read it while `remove` is at work. */
  async without<T>(image: string, remove: () => Promise<T>): Promise<T> {
    this.#leaving.add(image);
    try {
      await this.close(image);
      return await remove();
    } finally {
      this.#leaving.delete(image);
    }
  }

  /** For the end of the daemon: nothing is served after it. */
  async closeAll(): Promise<void> {
    this.#isClosed = true;
    await Promise.all([...this.#servers.keys()].map((image) => this.close(image)));
    await this.#digests.closeAll();
    await this.multicasts.closeAll();
  }

  #serverOf(image: string): ImageServer {
    const server = this.#servers.get(image) ?? new ImageServer(this.#context, image);
    this.#servers.set(image, server);
    return server;
  }

  #refuseStranger(image: string, reader: string): void {
    const { images, host } = this.#context;
    if ((images.get(image).readers ?? []).includes(reader)) return;
    throw new MigrationError('CONFLICT', `${reader} does not read image ${image} of ${host}`);
  }

  /** A session that is opened now would outlive the close of all sessions. */
  #refuseLeaving(image: string): void {
    const { host } = this.#context;
    if (this.#isClosed) throw new MigrationError('UNREACHABLE', `${host} is closing`, { isRetryable: true });
    if (this.#leaving.has(image)) throw new MigrationError('NOT_FOUND', `image ${image} on ${host} is being removed`);
  }
}

/**
 * The images of this host that other hosts read. Serving belongs to the image: it outlives the fork that has taken the
 * image, and a restart of the daemon, after which the readers ask again. A reader is known, durably, from its first
 * question until it says that it needs the image no more, so that nobody removes the image below it.
 */
import { MigrationError } from '../../../domain/errors.js';
import type { Transport } from '../../../domain/transport.js';
import type { ImageHolder } from '../../../engine/ports/fork.js';
import type { ImageContext } from '../../image/context.js';
import { type ImagePages, ImageServer } from './image-server.js';

/** How the answer to `serveImage` says that the image can never be complete. */
const FAILED = { imageState: 'failed' } as const;

export class ImageServers {
  readonly #context: ImageContext;
  readonly #servers = new Map<string, ImageServer>();
  /** The images that are being removed. */
  readonly #leaving = new Set<string>();
  #isClosed = false;

  constructor(context: ImageContext) {
    this.#context = context;
  }

  async serve(image: string, reader: string, transport: Transport, pages: ImagePages): Promise<ImageHolder> {
    const { images, host } = this.#context;
    // A session that is opened now would outlive the close of all sessions.
    if (this.#isClosed) throw new MigrationError('UNREACHABLE', `${host} is closing`, { isRetryable: true });
    if (reader === host) throw new MigrationError('USAGE', `${host} has image ${image} itself`);
    const { readers = [] } = images.get(image);
    if (this.#leaving.has(image)) throw new MigrationError('NOT_FOUND', `image ${image} on ${host} is being removed`);
    const server = this.#servers.get(image) ?? new ImageServer(this.#context, image);
    this.#servers.set(image, server);
    const holder = server.serve(transport, pages);
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
    const saving = images.replace(image, others.length === 0 ? record : { ...record, readers: others });
    if (others.length === 0) await this.close(image);
    await saving;
  }

  /** The fork point has been taken. */
  async fix(image: string): Promise<void> {
    await this.#servers.get(image)?.fix();
  }

  /** The capture of the image is about to be closed. */
  async endCapture(image: string): Promise<void> {
    await this.#servers.get(image)?.endCapture();
  }

  /** Closes all sessions of the image. Its readers lose their connection, and ask again. */
  async close(image: string): Promise<void> {
    const server = this.#servers.get(image);
    this.#servers.delete(image);
    await server?.close();
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
  }
}

/** The error of an image that can never be complete. `isFinal` knows it, also when it comes from another host. */
export function failedImage(image: string, host: string, cause?: unknown): MigrationError {
  const reason = cause instanceof Error ? `: ${cause.message}` : '';
  return new MigrationError('CONFLICT', `image ${image} on ${host} has failed${reason}`, { details: FAILED });
}

/** The reason in the exit of clones that end because the root is no peer any more (decision/removed-root.ts). */
export const ROOT_REMOVED = 'root-removed';

/** The error of an image whose missing pages can never come for that reason. `isFinal` knows it. */
export function rootRemoved(image: string, host: string): MigrationError {
  const message = `image ${image} lacks pages that only ${host} has, and ${host} is not among the peers of this host`;
  return new MigrationError('NOT_FOUND', message, { details: { ...FAILED, exitReason: ROOT_REMOVED } });
}

/** The reason in the exit of clones that end for this failure of their image. */
export function exitReasonOf({ details }: { readonly details?: unknown }): string {
  const { exitReason } = (details ?? {}) as { exitReason?: unknown };
  return exitReason === ROOT_REMOVED ? ROOT_REMOVED : 'stopped';
}

/** The host that has the image says that it can never be complete. Any other error may pass. */
export function isFinal({ details }: MigrationError): boolean {
  return (details as Partial<typeof FAILED> | null | undefined)?.imageState === FAILED.imageState;
}

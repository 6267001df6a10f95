/**
 * Serves one image to the hosts that read it: one session for each transport, which all of them share. While the parent
 * is still being captured, the session reads the capture, and a page that is asked for is copied first. The complete
 * image is served from its files.
 */
import { randomBytes } from 'node:crypto';
import { toMigrationError } from '../../../domain/errors.js';
import { TRANSPORTS, type Transport, transportRow } from '../../../domain/transport.js';
import type { ImageHolder } from '../../../engine/ports/fork.js';
import type { ImageCaptureHandle, SourceSessionHandle } from '../../../native/types.js';
import type { ImageContext } from '../../image/context.js';

const SESSION_BYTES = 16;
const TOKEN_BYTES = 32;

/** The transport that can read every holder, also one whose pages are not in files yet. */
export const ANY_HOLDER_TRANSPORT: Transport =
  TRANSPORTS.find((transport) => transportRow(transport).readsProcessMemory) ?? TRANSPORTS[0];

interface Served {
  readonly pages: SourceSessionHandle;
  readonly holder: ImageHolder;
}

/** Where the pages of the image are. */
export interface ImagePages {
  /** Null: all of them are in the image's files. */
  readonly capture: ImageCaptureHandle | null;
  /** The image has its content: it is behind its fork point. */
  readonly isFixed: boolean;
}

export class ImageServer {
  readonly #context: ImageContext;
  readonly #image: string;
  #ofCapture: Promise<Served> | null = null;
  readonly #ofFiles = new Map<Transport, Promise<Served>>();
  #isFixed = false;

  constructor(context: ImageContext, image: string) {
    this.#context = context;
    this.#image = image;
  }

  /** Idempotent. Only some transports can serve a capture: another one is replaced by one of these. */
  async serve(transport: Transport, { capture, isFixed }: ImagePages): Promise<ImageHolder> {
    this.#isFixed ||= isFixed;
    return (await (capture === null ? this.#serveFiles(transport) : this.#serveCapture(transport, capture))).holder;
  }

  /** The content of the image is fixed: other hosts may learn which pages are holes. */
  async fix(): Promise<void> {
    this.#isFixed = true;
    for (const serving of this.#all) (await serving.catch(() => null))?.pages.scan();
  }

  /** The capture is about to be closed. Its readers lose their connection, and ask again. */
  async endCapture(): Promise<void> {
    const serving = this.#ofCapture;
    this.#ofCapture = null;
    if (serving !== null) await this.#close(serving);
  }

  /** Other hosts that still read lose their connection. A later call of `serve` opens new sessions. */
  async close(): Promise<void> {
    const all = this.#all;
    this.#ofCapture = null;
    this.#ofFiles.clear();
    await Promise.all(all.map((serving) => this.#close(serving)));
  }

  get #all(): Promise<Served>[] {
    return [...this.#ofFiles.values(), ...(this.#ofCapture === null ? [] : [this.#ofCapture])];
  }

  #serveCapture(transport: Transport, capture: ImageCaptureHandle): Promise<Served> {
    if (this.#ofCapture !== null) return this.#ofCapture;
    const used = transportRow(transport).readsProcessMemory ? transport : ANY_HOLDER_TRANSPORT;
    const serving = this.#open(used, capture);
    this.#ofCapture = serving;
    serving.catch(() => {
      if (this.#ofCapture === serving) this.#ofCapture = null;
    });
    return serving;
  }

  #serveFiles(transport: Transport): Promise<Served> {
    const before = this.#ofFiles.get(transport);
    if (before !== undefined) return before;
    const serving = this.#open(transport, null);
    this.#ofFiles.set(transport, serving);
    serving.catch(() => {
      if (this.#ofFiles.get(transport) === serving) this.#ofFiles.delete(transport);
    });
    return serving;
  }

  async #close(serving: Promise<Served>): Promise<void> {
    const served = await serving.catch(() => null);
    await served?.pages.close().catch((error: unknown) => {
      const err = toMigrationError(error);
      this.#context.log.error({ image: this.#image, err }, 'the pages of an image are still served');
    });
  }

  async #open(transport: Transport, capture: ImageCaptureHandle | null): Promise<Served> {
    const { native, transports, images } = this.#context;
    const credentials = {
      session: randomBytes(SESSION_BYTES).toString('hex'),
      token: randomBytes(TOKEN_BYTES).toString('hex'),
    };
    const { provider, listener } = await transports.served(transport);
    const record = images.get(this.#image);
    const regions = await images.regions(record);
    const image = capture === null ? {} : { image: capture };
    const pages = await transports.registering(transport, () =>
      native.openSourceSession({ listener, provider, ...credentials, regions, ...image }),
    );
    if (this.#isFixed) pages.scan();
    const { host, port } = transports.place(transport, listener);
    const endpoint = { transport, host, port, keys: pages.keys };
    return { pages, holder: { ...credentials, endpoint, disks: record.disks } };
  }
}

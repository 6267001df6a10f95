/**
 * Serves the image of a fork to the hosts that join it: one session for each transport, which all of them share. While
 * the parent is still being captured, a page that is asked for is copied first.
 */
import { randomBytes } from 'node:crypto';
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import { type Transport, transportRow } from '../../../domain/transport.js';
import type { ImageHolder } from '../../../engine/ports/fork.js';
import type { ImageCaptureHandle, SourceSessionHandle } from '../../../native/types.js';
import type { ForkContext } from '../context.js';

const SESSION_BYTES = 16;
const TOKEN_BYTES = 32;

interface Served {
  readonly pages: SourceSessionHandle;
  readonly holder: ImageHolder;
}

export class ImageServer {
  readonly #context: ForkContext;
  readonly #image: string;
  readonly #served = new Map<Transport, Promise<Served>>();
  #isFixed: boolean;
  #isClosed = false;

  /** `isFixed`: the image has its content already. Otherwise `fix` says when it has. */
  constructor(context: ForkContext, image: string, isFixed: boolean) {
    this.#context = context;
    this.#image = image;
    this.#isFixed = isFixed;
  }

  /**
   * Idempotent. `capture` is that of an image which is not complete: only some transports can serve it. Throws
   * UNSUPPORTED for the others.
   */
  async serve(transport: Transport, capture: ImageCaptureHandle | null): Promise<ImageHolder> {
    if (this.#isClosed) throw new MigrationError('CONFLICT', `image ${this.#image} is no longer served`);
    const { readsProcessMemory, title } = transportRow(transport);
    if (capture !== null && !readsProcessMemory) {
      throw new MigrationError('UNSUPPORTED', `${title} cannot read image ${this.#image} while it is being captured`, {
        remedy: 'use TCP, or --parent stop',
      });
    }
    const serving = this.#served.get(transport) ?? this.#open(transport, capture);
    this.#served.set(transport, serving);
    serving.catch(() => this.#served.delete(transport));
    return (await serving).holder;
  }

  /** The content of the image is fixed: other hosts may learn which pages are holes. */
  async fix(): Promise<void> {
    this.#isFixed = true;
    for (const serving of this.#served.values()) (await serving.catch(() => null))?.pages.scan();
  }

  /** Other hosts that still read lose their connection. */
  async close(): Promise<void> {
    this.#isClosed = true;
    for (const serving of this.#served.values()) {
      const served = await serving.catch(() => null);
      await served?.pages.close().catch((error: unknown) => {
        const err = toMigrationError(error);
        this.#context.log.error({ image: this.#image, err }, 'the pages of an image are still served');
      });
    }
    this.#served.clear();
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

/**
 * Serves one image to the hosts that read it: one session for each transport, which all of them share. While the parent
 * is still being captured, the session reads the capture, and a page that is asked for is copied first. An image that
 * is being read from another host is served as far as it is here. The complete image is served from its files.
 */
import { randomBytes } from 'node:crypto';
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import { TRANSPORTS, type Transport, transportRow } from '../../../domain/transport.js';
import type { ImageHolder } from '../../../engine/ports/fork.js';
import type { ImageCaptureHandle, ImageFetchHandle, SourceSessionHandle } from '../../../native/types.js';
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

type Filling = ImageCaptureHandle | ImageFetchHandle;

/** Where the pages of the image are. */
export interface ImagePages {
  /** What knows which pages are in the image's files, and brings the others. Null: all of them are there. */
  readonly filling: Filling | null;
  /** The image has its content: it is behind its fork point. */
  readonly isFixed: boolean;
}

export class ImageServer {
  readonly #context: ImageContext;
  readonly #image: string;
  /** While the image fills here. */
  readonly #ofFilling = new Map<Transport, { readonly filling: Filling; readonly serving: Promise<Served> }>();
  readonly #ofFiles = new Map<Transport, Promise<Served>>();
  #isFixed = false;

  constructor(context: ImageContext, image: string) {
    this.#context = context;
    this.#image = image;
  }

  /** Idempotent. Only some transports can serve an image that is being filled: another one is replaced. */
  async serve(transport: Transport, { filling, isFixed }: ImagePages): Promise<ImageHolder> {
    this.#isFixed ||= isFixed;
    const serving = filling === null ? this.#serveFiles(transport) : this.#serveFilling(transport, filling);
    return (await serving).holder;
  }

  /**
   * The same for a host that asks here first, and elsewhere for what is not here. What has been opened while the image
   * was filled serves the complete image as well. Throws CONFLICT if nothing here knows which pages there are.
   */
  async serveHeld(transport: Transport, pages: ImagePages): Promise<ImageHolder> {
    if (pages.filling !== null) return this.serve(transport, pages);
    const serving = this.#ofFilling.get(transport)?.serving ?? this.#ofFilling.get(ANY_HOLDER_TRANSPORT)?.serving;
    if (serving === undefined) {
      throw new MigrationError('CONFLICT', `image ${this.#image} has no record of its pages any more`);
    }
    return (await serving).holder;
  }

  /** The content of the image is fixed: other hosts may learn which pages are holes. */
  async fix(): Promise<void> {
    this.#isFixed = true;
    for (const serving of this.#all) (await serving.catch(() => null))?.pages.scan();
  }

  /** What fills the image is about to be closed. Its readers lose their connection, and ask again. */
  async endFilling(): Promise<void> {
    const all = [...this.#ofFilling.values()];
    this.#ofFilling.clear();
    await Promise.all(all.map(({ serving }) => this.#close(serving)));
  }

  /** Other hosts that still read lose their connection. A later call of `serve` opens new sessions. */
  async close(): Promise<void> {
    const all = this.#all;
    this.#ofFilling.clear();
    this.#ofFiles.clear();
    await Promise.all(all.map((serving) => this.#close(serving)));
  }

  get #all(): Promise<Served>[] {
    return [...this.#ofFiles.values(), ...[...this.#ofFilling.values()].map(({ serving }) => serving)];
  }

  #serveFilling(transport: Transport, filling: Filling): Promise<Served> {
    const used = transportFor(transport, filling);
    const before = this.#ofFilling.get(used);
    if (before?.filling === filling) return before.serving;
    if (before !== undefined) void this.#close(before.serving);
    const serving = this.#open(used, filling);
    const entry = { filling, serving };
    this.#ofFilling.set(used, entry);
    serving.catch(() => {
      if (this.#ofFilling.get(used) === entry) this.#ofFilling.delete(used);
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

  async #open(transport: Transport, filling: Filling | null): Promise<Served> {
    const { native, transports, images } = this.#context;
    const credentials = {
      session: randomBytes(SESSION_BYTES).toString('hex'),
      token: randomBytes(TOKEN_BYTES).toString('hex'),
    };
    const served = await transports.served(transport);
    const record = images.get(this.#image);
    const regions = await images.regions(record);
    const image = filling === null ? {} : { image: filling };
    const pages = await transports.registering(transport, () =>
      native.openSourceSession({ ...served, ...credentials, regions, ...image }),
    );
    if (this.#isFixed) pages.scan();
    const endpoint = { transport, ...transports.place(transport, served.listener), keys: pages.keys };
    return { pages, holder: { ...credentials, endpoint, disks: record.disks } };
  }
}

/** A capture is read from a process, and no file of an image that is being filled may be handed out. */
function transportFor(wanted: Transport, filling: Filling): Transport {
  const { readsProcessMemory, sameMachineOnly } = transportRow(wanted);
  const fits = 'seal' in filling ? readsProcessMemory : !sameMachineOnly;
  return fits ? wanted : ANY_HOLDER_TRANSPORT;
}

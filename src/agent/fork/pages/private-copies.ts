/**
 * Clones with memory of their own (`--memory private`). Each clone is filled from the complete image like a migrating
 * VM from its source: by page faults, ahead of a sweep, over the host's own shared-memory transport. A clone that is
 * full is an ordinary VM and does not depend on the image any more.
 */
import { randomBytes } from 'node:crypto';
import { unlink } from 'node:fs/promises';
import { OWN_MACHINE_TRANSPORT } from '../../../domain/transport.js';
import type { SourceSessionHandle } from '../../../native/types.js';
import type { ImageContext } from '../../image/context.js';
import type { ImageRecord } from '../../image/record.js';
import { PageSession } from '../../migration/page-session.js';
import type { ManagedVm } from '../../vm/vms.js';

const SESSION_BYTES = 16;
const TOKEN_BYTES = 32;

export class PrivateCopies {
  readonly #context: ImageContext;
  readonly #image: ImageRecord;
  readonly #copies = new Map<ManagedVm, Copy>();

  constructor(context: ImageContext, image: ImageRecord) {
    this.#context = context;
    this.#image = image;
  }

  /**
   * Starts serving the faults of these clones. The image must be complete. `isResume` is true if an earlier daemon has
   * fetched some of their pages.
   */
  async open(clones: readonly ManagedVm[], isResume: boolean): Promise<void> {
    for (const vm of clones) {
      if (vm.memory === null || this.#copies.has(vm)) continue;
      const copy = await Copy.open(this.#context, this.#image, vm, isResume);
      this.#copies.set(vm, copy);
    }
  }

  /** Starts fetching the remaining pages. To be called when the clones run. */
  fill(): void {
    for (const copy of this.#copies.values()) copy.pages.start();
  }

  /** Closes the session of a clone that has ended. */
  async drop(vm: ManagedVm): Promise<void> {
    const copy = this.#copies.get(vm);
    this.#copies.delete(vm);
    await copy?.close();
  }

  get isComplete(): boolean {
    return [...this.#copies.values()].every((copy) => copy.isComplete);
  }

  get pagesDone(): number {
    return [...this.#copies.values()].reduce((sum, copy) => sum + copy.pagesDone, 0);
  }

  get pagesTotal(): number {
    const { sizeBytes, pageBytes } = this.#image.spec.memory;
    return this.#copies.size * (sizeBytes / pageBytes);
  }

  /** Makes the clones ordinary VMs. All of them must be full. */
  async finish(): Promise<void> {
    const { vms } = this.#context;
    for (const [vm, copy] of this.#copies) {
      await copy.close();
      const { name } = vm.spec;
      if (!vms.has(name) || vms.get(name) !== vm || vm.state === 'stopped') continue;
      for (const { id } of vm.spec.memory.regions) {
        await unlink(vms.presencePath(name, id)).catch((error: NodeJS.ErrnoException) => {
          if (error.code !== 'ENOENT') throw error;
        });
      }
      await vms.amend(name, () => ({ image: null }));
    }
    this.#copies.clear();
  }

  /** Closes all sessions. Missing pages stay missing. */
  async close(): Promise<void> {
    await Promise.all([...this.#copies.values()].map((copy) => copy.close()));
  }
}

class Copy {
  readonly pages: PageSession;
  readonly #source: SourceSessionHandle;
  readonly #pagesTotal: number;
  readonly #complete: { isThere: boolean };

  private constructor(
    pages: PageSession,
    source: SourceSessionHandle,
    pagesTotal: number,
    complete: { isThere: boolean },
  ) {
    this.pages = pages;
    this.#source = source;
    this.#pagesTotal = pagesTotal;
    this.#complete = complete;
  }

  static async open(context: ImageContext, image: ImageRecord, vm: ManagedVm, isResume: boolean): Promise<Copy> {
    const { native, transports, images } = context;
    const credentials = {
      session: randomBytes(SESSION_BYTES).toString('hex'),
      token: randomBytes(TOKEN_BYTES).toString('hex'),
    };
    const served = await transports.served(OWN_MACHINE_TRANSPORT);
    const regions = await images.regions(image);
    const source = await native.openSourceSession({ ...served, ...credentials, regions });
    try {
      source.scan();
      const complete = { isThere: false };
      const pages = new PageSession(context, vm, {
        ...{ ...credentials, isResume, bandwidthBytesPerS: 0 },
        order: await images.touchOrder(image.id),
        onComplete: () => {
          complete.isThere = true;
        },
      });
      const place = transports.place(OWN_MACHINE_TRANSPORT, served.listener);
      await pages.connect({ transport: OWN_MACHINE_TRANSPORT, ...place, keys: source.keys });
      pages.serveDemand();
      return new Copy(pages, source, image.spec.memory.sizeBytes / image.spec.memory.pageBytes, complete);
    } catch (error) {
      await source.close();
      throw error;
    }
  }

  get isComplete(): boolean {
    return this.#complete.isThere || this.pages.snapshot.state === 'complete';
  }

  get pagesDone(): number {
    if (this.isComplete) return this.#pagesTotal;
    const { pagesPresent, pagesZero } = this.pages.snapshot.counters;
    return Number(pagesPresent) + Number(pagesZero);
  }

  async close(): Promise<void> {
    await this.pages.close();
    await this.#source.close();
  }
}

/**
 * The memory of an incoming VM as it arrived. Each page is tagged before the VM can see it (native/target), so the tags
 * say what came, whatever the VM has written since. They are in a file for each region, so a restart of the daemon
 * loses none.
 */
import { unlink } from 'node:fs/promises';
import { toMigrationError } from '../../domain/errors.js';
import type { ArrivedDigests, ChunkRange } from '../../engine/ports/session.js';
import type { ArrivalTags } from '../../native/chunk-types.js';
import { tagPath } from '../vm/ram-files.js';
import type { ManagedVm } from '../vm/vms.js';
import type { MigrationContext } from './context.js';

export class ArrivedMemory {
  readonly #context: MigrationContext;
  readonly #vm: ManagedVm;
  readonly #key: string | undefined;

  /** `key`: that of a move that is verified. */
  constructor(context: MigrationContext, vm: ManagedVm, key: string | undefined) {
    this.#context = context;
    this.#vm = vm;
    this.#key = key;
  }

  /** The VM must not move on, or be forked, before its memory is proven. */
  get isUnproven(): boolean {
    return this.#key !== undefined;
  }

  /** What the page session is to note. */
  get tags(): { tags?: ArrivalTags } {
    if (this.#key === undefined) return {};
    const { memory } = this.#vm.spec;
    return { tags: { key: this.#key, paths: memory.regions.map(({ id }) => this.#tagPath(id)) } };
  }

  /** Digests memory that has all arrived. What is lost cannot be proven any more, and the answer says so. */
  async digest({ region, first, count }: ChunkRange): Promise<ArrivedDigests> {
    const { native, log } = this.#context;
    const { name, memory } = this.#vm.spec;
    const found = memory.regions[region];
    if (this.#key === undefined || found === undefined)
      return { digests: null, reason: `${name} has no tags of that memory` };
    const lengthBytes = BigInt(found.lengthBytes);
    const file = { tagPath: this.#tagPath(found.id), lengthBytes, pageBytes: memory.pageBytes };
    try {
      const digests = await native.digestArrived(file, { key: this.#key, region, first, count });
      return { digests: digests.toString('base64') };
    } catch (thrown) {
      const err = toMigrationError(thrown);
      log.error({ vm: name, region: found.id, err }, 'the tags of memory that has arrived cannot be read');
      return { digests: null, reason: `the tags of what has arrived cannot be read: ${err.message}` };
    }
  }

  /** Stops the VM for good, if it is still this one. Durable when it resolves. Idempotent. */
  async condemn(damage: string): Promise<void> {
    const { vms, log } = this.#context;
    log.error({ vm: this.#vm.spec.name, damage }, 'the memory of a VM is damaged: it stands still for good');
    await vms.markDamaged(this.#vm, damage);
  }

  /** Removes what only the arrival needs. */
  async removeFiles(): Promise<void> {
    const { name, memory } = this.#vm.spec;
    for (const { id } of memory.regions) {
      for (const path of [this.#context.vms.presencePath(name, id), this.#tagPath(id)]) {
        await unlink(path).catch((error: NodeJS.ErrnoException) => {
          if (error.code !== 'ENOENT') throw error;
        });
      }
    }
  }

  #tagPath(region: string): string {
    return tagPath(this.#context.vms.place, this.#vm.spec.name, region);
  }
}

/**
 * The images of this host: `STATE/images/ID.json` (the record), `STATE/images/ID.state` (device state),
 * `STATE/images/ID.disks` (disks that came with a file), `STATE/images/ID.touched` (touch-order.ts), and memory files
 * on tmpfs (ram-files.ts).
 *
 * An image exists until a user removes it. It cannot be removed while a clone runs on it. The clones of an image are
 * the VMs whose record names it, so there is no counter that a crash could leave wrong. The record outlives the memory
 * (`unloaded`) as long as overlays wait to be merged or saved files need the disk layers.
 */
import { open, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { ImageView } from '../../domain/image.js';
import { RecordFiles } from '../../durable/record-files.js';
import type { Log } from '../../kit/log.js';
import type { NativeBinding, RegionFile, TouchOrder } from '../../native/types.js';
import { allocatedBytes, kindOf, type MemoryPromise } from '../vm/memory-room.js';
import {
  createImageFiles,
  imageDigestPath,
  imageFiles,
  imagePresencePath,
  imagesWithFiles,
  removeImageFiles,
} from '../vm/ram-files.js';
import type { VmManager } from '../vm/vms.js';
import { checkImageId, IMAGE_RECORD, type ImageRecord } from './record.js';
import { TouchOrders } from './touch-order.js';

/** The default share of the memory files' file system that images may take. */
const BUDGET_SHARE = 0.5;

export interface ImageStoreOptions {
  readonly host: string;
  readonly stateDir: string;
  readonly vms: VmManager;
  readonly native: NativeBinding;
  readonly log: Log;
  /** Null: half of the memory files' file system. */
  readonly budgetBytes: number | null;
}

/** What copies the pages of an image. */
export interface ImageFilling {
  readonly pagesDone: number;
  /** Why no page comes at present, or null. */
  readonly trouble: Error | null;
  /** What clones have touched until now, and before. */
  readonly touched: TouchOrder;
}

export class ImageStore {
  readonly orders: TouchOrders;
  readonly #options: ImageStoreOptions;
  readonly #files: RecordFiles<ImageRecord>;
  readonly #records = new Map<string, ImageRecord>();
  /** The paths of each image's memory files. */
  readonly #paths = new Map<string, readonly string[]>();
  /** The images that are being deleted: nobody may write their records again. */
  readonly #leaving = new Set<string>();
  /** How far each image is that is being filled. */
  readonly #fillings = new Map<string, ImageFilling>();

  private constructor(options: ImageStoreOptions, files: RecordFiles<ImageRecord>) {
    this.#options = options;
    this.#files = files;
    this.orders = new TouchOrders(options);
  }

  /**
   * Finds the images of an earlier daemon. An image whose memory files are missing is deleted, or unloaded if its disk
   * layers are still needed. Memory files without a record are deleted.
   */
  static async open(options: ImageStoreOptions): Promise<ImageStore> {
    const files = await RecordFiles.open<ImageRecord>(options.stateDir, 'images', IMAGE_RECORD);
    const store = new ImageStore(options, files);
    options.vms.room.addHolder(() => store.promises());
    const { records, corrupt } = await files.load();
    for (const err of corrupt) options.log.error({ err }, 'an image record cannot be read: its image is unavailable');
    for (const record of records) {
      await store.#remember(record);
      await store.orders.read(record);
      await store.#takeUp(record).catch((error: unknown) => {
        const fields = { image: record.id, err: toMigrationError(error) };
        options.log.error(fields, 'what is left of an image cannot be removed; the next start tries again');
      });
    }
    if (corrupt.length === 0) await store.#removeStray();
    return store;
  }

  async #takeUp(record: ImageRecord): Promise<void> {
    // A load that the daemon's end has interrupted leaves memory files.
    if (record.state === 'unloaded') return this.unload(record.id);
    const isThere = await this.#hasFiles(record);
    if (isThere || record.state === 'capturing' || record.state === 'failed') return;
    // Clones wait for its pages. Their fork sees the state `failed` and ends them (fork/session.ts).
    if (record.state === 'filling') return this.update(record.id, { state: 'failed' });
    const missing = 'the memory files of the image are missing, as after a reboot: it is deleted or unloaded';
    this.#options.log.warn({ image: record.id }, missing);
    await (hasLayerDuty(record) ? this.unload(record.id) : this.delete(record.id));
  }

  has(id: string): boolean {
    return this.#records.has(id);
  }

  /** Throws NOT_FOUND if this host has no such image. */
  get(id: string): ImageRecord {
    const record = this.#records.get(id);
    if (record === undefined) {
      throw new MigrationError('NOT_FOUND', `no image ${id.slice(0, 32)} on ${this.#options.host}`);
    }
    return record;
  }

  all(): readonly ImageRecord[] {
    return [...this.#records.values()];
  }

  /** The file for the device state. Waiting QEMUs have opened it before the state is written. */
  statePath(id: string): string {
    return join(this.#options.stateDir, 'images', `${id}.state`);
  }

  /** The directory of the disks that came with the image's file. */
  disksDirectory(id: string): string {
    checkImageId(id);
    return join(this.#options.stateDir, 'images', `${id}.disks`);
  }

  regions(record: ImageRecord): Promise<RegionFile[]> {
    return imageFiles(this.#options.vms.place, record.spec.memory, record.id);
  }

  /** `digestPath` is that of the digests of the region's pages, which need not exist. */
  async withDigests(record: ImageRecord): Promise<(RegionFile & { digestPath: string })[]> {
    const { place } = this.#options.vms;
    const { regions } = record.spec.memory;
    const files = await this.regions(record);
    return files.map((file, index) => ({
      ...file,
      digestPath: imageDigestPath(place, record.id, regions[index]?.id ?? ''),
    }));
  }

  async withPresence(record: ImageRecord): Promise<(RegionFile & { presencePath: string })[]> {
    const { place } = this.#options.vms;
    const { regions } = record.spec.memory;
    const files = await this.regions(record);
    return files.map((file, index) => ({
      ...file,
      presencePath: imagePresencePath(place, record.id, regions[index]?.id ?? ''),
    }));
  }

  /**
   * Creates the record, an empty device state and empty memory files. If `parent` is given, the memory files are hard
   * links to the parent's instead. If it rejects, an unloaded image of this id is as it was.
   */
  async create(record: ImageRecord, parent: readonly RegionFile[] | null): Promise<void> {
    checkImageId(record.id);
    const { vms, native } = this.#options;
    const before = this.#records.get(record.id);
    await this.#save(record);
    try {
      await (await open(this.statePath(record.id), 'w', 0o600)).close();
      await createImageFiles(vms.place, record.id, await this.regions(record), { native, parent });
    } catch (error) {
      if (before === undefined) await this.delete(record.id);
      else await this.unload(record.id, before);
      throw asNoSpace(error);
    }
  }

  /** Removes everything but the record, which becomes `before`, or stays with the state `unloaded`. Idempotent. */
  async unload(id: string, before: ImageRecord = this.get(id)): Promise<void> {
    await this.#save({ ...before, state: 'unloaded' });
    await removeImageFiles(this.#options.vms.place, id, before.spec.memory.pageBytes);
    await rm(this.statePath(id), { force: true });
    await this.orders.remove(id);
  }

  /** Durable when it resolves. */
  async update(id: string, change: Partial<ImageRecord>): Promise<void> {
    await this.#save({ ...this.get(id), ...change });
  }

  /** Writes a whole record in place of the image's. Durable when it resolves. */
  async replace(id: string, record: ImageRecord): Promise<void> {
    this.get(id);
    await this.#save({ ...record, id });
  }

  /** Registers an image whose pages are being copied. Null: the copying has ended. */
  setFilling(id: string, filling: ImageFilling | null): void {
    if (filling === null) this.#fillings.delete(id);
    else this.#fillings.set(id, filling);
  }

  /** The order in which clones have touched the image first, up to now. Empty if none has, or nobody has seen it. */
  async touchOrder(id: string): Promise<TouchOrder> {
    return this.#fillings.get(id)?.touched ?? this.orders.read(this.get(id));
  }

  /** Returns the names of the VMs that run on the image or wait for it. */
  clonesOf(id: string): string[] {
    const clones = this.#options.vms.all().filter((vm) => vm.image === id && vm.state !== 'stopped');
    return clones.map((vm) => vm.spec.name).sort();
  }

  /**
   * Removes the memory of an image that cannot be completed: it is useless, and the file system may be full. The record
   * stays for users to see.
   */
  async dropMemory(id: string): Promise<void> {
    await removeImageFiles(this.#options.vms.place, id, this.get(id).spec.memory.pageBytes);
  }

  /** Deletes the image. The caller has checked that no VM needs it. Idempotent. */
  async delete(id: string): Promise<void> {
    checkImageId(id);
    const pageBytes = this.#records.get(id)?.spec.memory.pageBytes ?? 4096;
    this.#leaving.add(id);
    try {
      await removeImageFiles(this.#options.vms.place, id, pageBytes);
      await rm(this.statePath(id), { force: true });
      await this.orders.remove(id);
      await rm(this.disksDirectory(id), { recursive: true, force: true });
      await this.#files.remove(id);
      this.#records.delete(id);
      this.#paths.delete(id);
    } finally {
      this.#leaving.delete(id);
    }
  }

  view(id: string): ImageView {
    const record = this.get(id);
    const { memory } = record.spec;
    const pagesTotal = memory.sizeBytes / memory.pageBytes;
    const filling = record.state === 'complete' ? undefined : this.#fillings.get(id);
    const pagesDone = record.state === 'complete' ? pagesTotal : (filling?.pagesDone ?? 0);
    const problem = record.problem ?? filling?.trouble?.message;
    return {
      id,
      host: this.#options.host,
      state: record.state,
      parent: record.spec.name,
      createdAt: record.createdAt,
      memoryBytes: memory.sizeBytes,
      allocatedBytes: this.#allocatedBytes(record),
      pageBytes: memory.pageBytes,
      deviceStateBytes: record.deviceStateBytes,
      touchedClusters: this.orders.count(id),
      pagesTotal,
      pagesDone,
      disks: record.disks.map(({ path }) => path),
      clones: this.clonesOf(id),
      ...(record.saves === undefined ? {} : { savedFiles: record.saves.map(({ path }) => path) }),
      ...(record.readers === undefined ? {} : { readers: record.readers }),
      ...(record.isChecked === undefined ? {} : { isChecked: record.isChecked }),
      ...(record.served === undefined ? {} : { served: record.served }),
      ...(problem === undefined ? {} : { problem }),
    };
  }

  list(): ImageView[] {
    return this.all()
      .map(({ id }) => this.view(id))
      .sort((a, b) => (a.createdAt < b.createdAt ? -1 : 1));
  }

  /**
   * Returns the bytes that a new image may take, within the budget and the file system. An image that is being filled
   * counts with its full size.
   */
  async bytesFree(): Promise<number> {
    const { fileBytes: freeBytes } = await this.#options.vms.room.free();
    const promises = [...this.promises()];
    const usedBytes = promises.reduce((bytes, promise) => bytes + promise.usedBytes, 0);
    const promisedBytes = promises.reduce((bytes, promise) => bytes + promise.promisedBytes, 0);
    const budgetBytes = this.#options.budgetBytes ?? (freeBytes + usedBytes) * BUDGET_SHARE;
    return Math.max(0, Math.floor(Math.min(budgetBytes - promisedBytes, freeBytes)));
  }

  /** What each image takes or will take, for the room of this host. One that fills counts with its full size. */
  *promises(): Iterable<MemoryPromise> {
    for (const record of this.all()) {
      const { pageBytes, sizeBytes } = record.spec.memory;
      const usedBytes = this.#allocatedBytes(record);
      const promisedBytes = record.state === 'filling' ? Math.max(sizeBytes, usedBytes) : usedBytes;
      yield { kind: kindOf(pageBytes), pageBytes, promisedBytes, usedBytes };
    }
  }

  /** Counts the blocks that the file system has allocated, not the length of the files. */
  #allocatedBytes({ id }: ImageRecord): number {
    return allocatedBytes((this.#paths.get(id) ?? []).map((path) => ({ path })));
  }

  async #hasFiles(record: ImageRecord): Promise<boolean> {
    const sizes = await Promise.all(
      (await this.regions(record)).map(async ({ path, lengthBytes }) => {
        const file = await stat(path).catch(() => null);
        return file !== null && BigInt(file.size) === lengthBytes;
      }),
    );
    return sizes.every((isThere) => isThere);
  }

  async #removeStray(): Promise<void> {
    const { vms, log } = this.#options;
    for (const id of await imagesWithFiles(vms.place)) {
      if (this.#records.has(id)) continue;
      log.warn({ image: id }, 'memory files of an image without a record are removed');
      await removeImageFiles(vms.place, id, 4096);
    }
  }

  /** Behind the removal of the record's file a save would write it anew, for an image that nobody knows. */
  #refuseIfLeaving({ id }: ImageRecord): void {
    if (!this.#leaving.has(id)) return;
    throw new MigrationError('NOT_FOUND', `image ${id} on ${this.#options.host} is being deleted`);
  }

  /** At once for a known image, so that a change of its record never loses another one. */
  async #remember(record: ImageRecord): Promise<void> {
    if (!this.#paths.has(record.id)) {
      const files = await this.regions(record);
      this.#paths.set(
        record.id,
        files.map(({ path }) => path),
      );
    }
    this.#records.set(record.id, record);
  }

  async #save(record: ImageRecord): Promise<void> {
    this.#refuseIfLeaving(record);
    const remembering = this.#remember(record);
    if (!this.#paths.has(record.id)) await remembering;
    this.#refuseIfLeaving(record);
    await this.#files.save(record);
  }
}

/** True if the record must outlive the memory: parents' overlays, saved files or hosts need its disks. */
export function hasLayerDuty({ overlays, saves = [], servedTo = [] }: ImageRecord): boolean {
  return overlays.length > 0 || saves.length > 0 || servedTo.length > 0;
}

function asNoSpace(error: unknown): MigrationError {
  const { code } = error as NodeJS.ErrnoException;
  if (code !== 'ENOSPC' && code !== 'EDQUOT') return toMigrationError(error);
  return new MigrationError('NO_SPACE', 'no space for the files of an image', { cause: error });
}

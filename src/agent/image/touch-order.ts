/**
 * The order in which the first clones of an image have touched its memory: `STATE/images/ID.touched`, an entry in the
 * file of a saved image, and the answer to a host that reads the image. It is an order and nothing else: pages that it
 * names come first, and all others come too. So one that is missing, damaged or made up costs time only.
 *
 *   head       24 bytes   magic "VMGTOUCH", u32 version, u32 bytes of a cluster, u32 clusters of the image, u32 count
 *   clusters              u32 for each, in the order of the first touches; numbered through all regions
 *   checksum   32 bytes   SHA-256 of what is before it
 *
 * Integers are little-endian.
 */
import { createHash } from 'node:crypto';
import { open, readFile, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { toMigrationError } from '../../domain/errors.js';
import type { Log } from '../../kit/log.js';
import type { TouchOrder } from '../../native/types.js';
import { CONSTANTS } from '../../protocol/wire.js';
import type { ImageRecord } from './record.js';

const MAGIC = Buffer.from('VMGTOUCH', 'latin1');
const VERSION = 1;
const HEAD_BYTES = 24;
const NUMBER_BYTES = 4;
const CHECKSUM_BYTES = 32;
const { TOUCH_CLUSTER_BYTES, TOUCH_CLUSTERS_MAX } = CONSTANTS;

export const TOUCH_ORDER_BYTES_MAX = HEAD_BYTES + NUMBER_BYTES * TOUCH_CLUSTERS_MAX + CHECKSUM_BYTES;
export const NO_ORDER: TouchOrder = new Uint32Array(0);

type ImageMemory = Pick<ImageRecord['spec']['memory'], 'regions'>;

function clustersOf({ regions }: ImageMemory): number {
  return regions.reduce((count, { lengthBytes }) => count + Math.ceil(lengthBytes / TOUCH_CLUSTER_BYTES), 0);
}

export function encodeTouchOrder(memory: ImageMemory, order: TouchOrder): Buffer {
  const bytes = Buffer.alloc(HEAD_BYTES + NUMBER_BYTES * order.length + CHECKSUM_BYTES);
  MAGIC.copy(bytes);
  const head = [VERSION, TOUCH_CLUSTER_BYTES, clustersOf(memory), order.length];
  head.forEach((number, index) => bytes.writeUInt32LE(number, MAGIC.length + NUMBER_BYTES * index));
  order.forEach((cluster, index) => bytes.writeUInt32LE(cluster, HEAD_BYTES + NUMBER_BYTES * index));
  checksum(bytes).copy(bytes, bytes.length - CHECKSUM_BYTES);
  return bytes;
}

/** Returns null if this is not an order of an image with this memory, each cluster once, that this build reads. */
export function decodeTouchOrder(memory: ImageMemory, bytes: Buffer): TouchOrder | null {
  if (bytes.length < HEAD_BYTES + CHECKSUM_BYTES || bytes.length > TOUCH_ORDER_BYTES_MAX) return null;
  const number = (index: number): number => bytes.readUInt32LE(MAGIC.length + NUMBER_BYTES * index);
  const [version, clusterBytes, clusterCount, count] = [number(0), number(1), number(2), number(3)];
  const isKnown = bytes.subarray(0, MAGIC.length).equals(MAGIC) && version === VERSION;
  const isOfImage = clusterBytes === TOUCH_CLUSTER_BYTES && clusterCount === clustersOf(memory);
  if (!isKnown || !isOfImage || bytes.length !== HEAD_BYTES + NUMBER_BYTES * count + CHECKSUM_BYTES) return null;
  if (!checksum(bytes).equals(bytes.subarray(-CHECKSUM_BYTES))) return null;
  const order = new Uint32Array(count).map((_, index) => number(4 + index));
  return order.every((cluster) => cluster < clusterCount) && mergeOrders(order).length === count ? order : null;
}

/** One after the other, each cluster where it comes first, and no more than an order may have. */
export function mergeOrders(...orders: readonly TouchOrder[]): TouchOrder {
  const count = orders.reduce((sum, { length }) => sum + length, 0);
  const highest = orders.reduce((most, order) => order.reduce((one, other) => Math.max(one, other), most), 0);
  const merged = new Uint32Array(Math.min(count, TOUCH_CLUSTERS_MAX));
  // A bit for each cluster: a set of numbers would take some 100 times as long.
  const seen = new Uint8Array((highest >>> 3) + 1);
  let used = 0;
  for (const order of orders) {
    for (let at = 0; at < order.length && used < merged.length; at++) {
      const cluster = order[at] ?? 0;
      const byte = cluster >>> 3;
      const bit = 1 << (cluster & 7);
      if (((seen[byte] ?? 0) & bit) !== 0) continue;
      seen[byte] = (seen[byte] ?? 0) | bit;
      merged[used] = cluster;
      used++;
    }
  }
  return merged.slice(0, used);
}

function checksum(bytes: Buffer): Buffer {
  return createHash('sha256').update(bytes.subarray(0, -CHECKSUM_BYTES)).digest();
}

/** The orders of the images of this host. No call rejects: whatever is wrong with a file, its image is as good. */
export class TouchOrders {
  readonly #directory: string;
  readonly #log: Log;
  readonly #counts = new Map<string, number>();

  constructor(options: { readonly stateDir: string; readonly log: Log }) {
    this.#directory = join(options.stateDir, 'images');
    this.#log = options.log;
  }

  path(id: string): string {
    return join(this.#directory, `${id}.touched`);
  }

  /** How many clusters the order of the image has, as far as it was read or written here. */
  count(id: string): number {
    return this.#counts.get(id) ?? 0;
  }

  /** Returns the image's order, empty if there is none. A file that is none is removed. */
  async read({ id, spec }: Pick<ImageRecord, 'id' | 'spec'>): Promise<TouchOrder> {
    try {
      const isSmall = (await stat(this.path(id))).size <= TOUCH_ORDER_BYTES_MAX;
      const order = isSmall ? decodeTouchOrder(spec.memory, await readFile(this.path(id))) : null;
      if (order === null) {
        this.#log.warn({ image: id }, 'the order in which clones have touched an image is damaged: it is not used');
        await this.remove(id);
        return NO_ORDER;
      }
      this.#counts.set(id, order.length);
      return order;
    } catch (error) {
      this.#counts.delete(id);
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') this.#warn(id, error, 'read');
      return NO_ORDER;
    }
  }

  /** It does not give up the reserve of the state directory, as a record would: it is not worth that. */
  async write({ id, spec }: Pick<ImageRecord, 'id' | 'spec'>, order: TouchOrder): Promise<void> {
    const sidePath = `${this.path(id)}.new`;
    try {
      const file = await open(sidePath, 'w', 0o600);
      try {
        await file.writeFile(encodeTouchOrder(spec.memory, order));
      } finally {
        await file.close();
      }
      await rename(sidePath, this.path(id));
      this.#counts.set(id, order.length);
    } catch (error) {
      this.#warn(id, error, 'written');
      await rm(sidePath, { force: true }).catch(() => undefined);
    }
  }

  async remove(id: string): Promise<void> {
    this.#counts.delete(id);
    for (const path of [this.path(id), `${this.path(id)}.new`]) {
      await rm(path, { force: true }).catch((error: unknown) => this.#warn(id, error, 'removed'));
    }
  }

  #warn(image: string, error: unknown, doing: string): void {
    const what = `the order in which clones have touched an image cannot be ${doing}`;
    this.#log.warn({ image, err: toMigrationError(error) }, what);
  }
}

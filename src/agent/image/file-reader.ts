/** Reads an image's file from its beginning to its end, and checks every byte of it. */
import { type FileHandle, open } from 'node:fs/promises';
import { dirname } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import {
  damaged,
  decodeEntry,
  decodeHead,
  ENTRY,
  ENTRY_HEADER_BYTES,
  type EntryHeader,
  FILE_VERSIONS,
  type FileVersion,
  HEAD_BYTES,
  isIntact,
  STATE_BYTES_MAX,
} from './file-format.js';
import { contentHash, type FileSignature, type FileSigner, parseSignature, signerOfFile } from './file-signature.js';
import { type ImageRecord, imageRecordSchema } from './record.js';
import { TOUCH_ORDER_BYTES_MAX } from './touch-order.js';

/** The files that the content goes to. They exist. */
export interface ReadPlaces {
  readonly state: string;
  /** Null: the file has no order of touches. */
  readonly order: string | null;
  readonly regions: readonly string[];
  readonly disks: readonly { readonly path: string; readonly lengthBytes: number }[];
}

export class ImageFileReader {
  readonly #file: FileHandle;
  #signature: FileSignature | null = null;
  /** Of the headers after the signature. */
  readonly #hash = contentHash();
  #entryCount = 0;

  constructor(file: FileHandle) {
    this.#file = file;
  }

  /**
   * Returns the description. What other images and parents have to do with this host is not in it. `signer`: the host
   * of the cluster that has written the file, or null.
   */
  async begin(
    known: FileSigner | null,
  ): Promise<{ version: FileVersion; hasOrder: boolean; record: ImageRecord; signer: string | null }> {
    const { version, hasOrder, isSigned, descriptionBytes } = decodeHead(await this.#read(HEAD_BYTES));
    const { header, data } = await this.#entry();
    if (header.kind !== ENTRY.DESCRIPTION || data.length !== descriptionBytes)
      throw damaged('the description is missing');
    const parsed = imageRecordSchema.safeParse(parseJson(data));
    if (!parsed.success) throw damaged('the description is not a valid image record');
    const { saves: _, readers: _r, servedTo: _s, sharedWith: _w, from: _f, ...record } = parsed.data;
    if (record.state !== 'complete' || record.spec.memory.backing !== 'shared')
      throw damaged('its record is not that of a complete image');
    if ((version === FILE_VERSIONS.PLAIN) !== (record.layers === undefined))
      throw damaged('its record does not fit its format');
    if (!isConsistent(record)) throw damaged('its disks contradict each other');
    // Such an image is not saved: its disks are those of another host, or it is not what its root has.
    const isServed = record.served !== undefined || record.spec.disks.some(({ served }) => served !== undefined);
    if (isServed || record.problem !== undefined) throw damaged('its disks or pages are not in it');
    const signer = isSigned ? await this.#signer(known, data) : null;
    return { version, hasOrder, record: { ...record, overlays: [] }, signer };
  }

  async #signer(known: FileSigner | null, description: Buffer): Promise<string | null> {
    const { header, data } = await this.#entry();
    if (header.kind !== ENTRY.SIGNATURE) throw damaged('the signature is missing');
    this.#signature = parseSignature(data);
    return known === null ? null : signerOfFile(known, description, this.#signature);
  }

  /** Writes all entries to their files and returns the length of the device state. */
  async rest({ spec }: ImageRecord, places: ReadPlaces): Promise<number> {
    const { regions } = spec.memory;
    const targets = [
      { kind: ENTRY.DEVICE_STATE, region: 0, path: places.state, lengthBytes: STATE_BYTES_MAX },
      ...(places.order === null
        ? []
        : [{ kind: ENTRY.TOUCH_ORDER, region: 0, path: places.order, lengthBytes: TOUCH_ORDER_BYTES_MAX }]),
      ...places.regions.map((path, region) => ({
        ...{ kind: ENTRY.MEMORY, region, path },
        lengthBytes: regions[region]?.lengthBytes ?? 0,
      })),
      ...places.disks.map((disk, region) => ({ kind: ENTRY.DISK, region, ...disk })),
    ];
    const files: FileHandle[] = [];
    try {
      for (const { path } of targets) files.push(await open(path, 'r+'));
      let last = { target: 0, endBytes: 0 };
      let stateBytes = 0;
      for (;;) {
        const { header, data } = await this.#entry();
        if (header.kind === ENTRY.END) break;
        const target = targets.findIndex(({ kind, region }) => kind === header.kind && region === header.region);
        const endBytes = header.offsetBytes + header.lengthBytes;
        const isInOrder = target > last.target || (target === last.target && header.offsetBytes >= last.endBytes);
        const hasGap = target === 0 && header.offsetBytes !== stateBytes;
        if (target === -1 || !isInOrder || hasGap || endBytes > (targets[target]?.lengthBytes ?? 0))
          throw damaged('an entry is misplaced');
        if (target === 0) stateBytes = endBytes;
        last = { target, endBytes };
        await writeWhole(files[target], data, header.offsetBytes, targets[target]?.path ?? '');
      }
      if (stateBytes === 0) throw damaged('the device state is missing');
      if ((await this.#file.read(Buffer.alloc(1), 0, 1)).bytesRead !== 0)
        throw damaged('there are bytes after the end');
      return stateBytes;
    } finally {
      for (const file of files) await file.close();
    }
  }

  async #entry(): Promise<{ header: EntryHeader; data: Buffer }> {
    const bytes = await this.#read(ENTRY_HEADER_BYTES);
    const header = decodeEntry(bytes);
    const data = await this.#read(header.lengthBytes);
    if (!isIntact(bytes, data)) throw damaged('a checksum is wrong');
    if (this.#signature !== null) this.#hash.update(bytes);
    if (header.kind === ENTRY.END) {
      if (header.offsetBytes !== this.#entryCount) throw damaged('entries are missing');
      if (this.#signature !== null && this.#hash.digest('hex') !== this.#signature.contentDigest)
        throw damaged('its content is not that which was signed');
    }
    this.#entryCount++;
    return { header, data };
  }

  async #read(lengthBytes: number): Promise<Buffer> {
    const bytes = Buffer.alloc(lengthBytes);
    for (let done = 0; done < lengthBytes; ) {
      const { bytesRead } = await this.#file.read(bytes, done, lengthBytes - done);
      if (bytesRead === 0) throw damaged('the file is truncated');
      done += bytesRead;
    }
    return bytes;
  }
}

/** The disks are named in three places, and a check of one must not let the others through. */
function isConsistent({ spec, disks, layers }: ImageRecord): boolean {
  const same = (a: readonly object[], b: readonly object[]) => JSON.stringify(a) === JSON.stringify(b);
  const named = spec.disks.map(({ id, path, format }) => ({ id, path, format }));
  if (
    !same(
      named,
      disks.map(({ id, path, format }) => ({ id, path, format })),
    )
  )
    return false;
  if (layers === undefined) return true;
  const hasDigests = layers.every(({ files }) => files.every(({ digest }) => digest !== null));
  const tops = layers.slice(0, disks.length).map(({ id, isReadOnly, files: [top] }) => ({
    id,
    path: top?.path,
    format: top?.format,
    isReadOnly,
  }));
  const areDrivesReadOnly = layers.slice(disks.length).every(({ isReadOnly }) => isReadOnly);
  const areUnique = new Set(layers.map(({ id }) => id)).size === layers.length;
  return (
    hasDigests &&
    areDrivesReadOnly &&
    areUnique &&
    same(
      tops,
      spec.disks.map(({ id, path, format, isReadOnly }) => ({ id, path, format, isReadOnly })),
    )
  );
}

async function writeWhole(file: FileHandle | undefined, data: Buffer, offsetBytes: number, path: string) {
  const { bytesWritten } = (await file?.write(data, 0, data.length, offsetBytes)) ?? { bytesWritten: 0 };
  if (bytesWritten === data.length) return;
  throw new MigrationError('NO_SPACE', `no space for the content of the image in ${dirname(path)}`);
}

function parseJson(data: Buffer): unknown {
  try {
    return JSON.parse(data.toString('utf8'));
  } catch {
    return null;
  }
}

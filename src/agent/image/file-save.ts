/**
 * Saves an image to a file. It is not optimized for speed: no VM waits for the bytes, which pass through this process a
 * mebibyte at a time.
 *
 * The file is written under another name and linked when it is complete. The image's record names it before that, so
 * that a restarted daemon removes what a broken save has left, and so that `image rm` knows who needs the disk layers.
 */
import { constants } from 'node:fs';
import { access, type FileHandle, link, open, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { syncDirectory } from '../../durable/durable-file.js';
import { fileSystemAnswers, openUserFile } from '../../kit/user-file.js';
import type { ImageContext } from './context.js';
import {
  CHUNK_BYTES,
  DESCRIPTION_BYTES_MAX,
  ENTRY,
  ENTRY_HEADER_BYTES,
  type EntryHeader,
  encodeEntry,
  encodeHead,
  FILE_VERSIONS,
  type FileHead,
  type FileVersion,
} from './file-format.js';
import { contentHash, type FileSigner, SIGNATURE_BYTES, signFile } from './file-signature.js';
import { checkLayers, type DiskLayer, fileFailure, withDigests } from './layers.js';
import type { ImageRecord, SavedFile } from './record.js';
import { describeLayers, isDescribed } from './start-check.js';
import type { ImageStore } from './store.js';
import { encodeTouchOrder } from './touch-order.js';

const LEFT = 'what a broken save of an image has left cannot be removed now';
const ZEROS = Buffer.alloc(CHUNK_BYTES);

/**
 * Creates the whole file or none. `withDisks`: the file has the content of the writable disks too, and so needs nothing
 * of this host. Throws CONFLICT if the file exists or the image is not complete, DISK_CHANGED if its disks are not
 * those of its moment any more.
 */
export async function saveImage(
  context: ImageContext,
  id: string,
  path: string,
  options: { withDisks?: boolean } = {},
): Promise<{ fileBytes: number }> {
  const { images } = context;
  const { state, served } = images.get(id);
  if (served !== undefined) {
    throw new MigrationError('UNSUPPORTED', `disks of image ${id} are on ${served.host}`, {
      remedy: `save the image there: "vmctl image save ${id} FILE"`,
    });
  }
  if (state !== 'complete') throw new MigrationError('CONFLICT', `image ${id} is ${state}`);
  if (!path.startsWith('/')) throw new MigrationError('USAGE', 'the path of an image file must be absolute');
  await fileSystemAnswers(dirname(path));
  await refuseExisting(path);
  const layers = await knownLayers(context, id);
  const record = images.get(id);
  const hasDisks = options.withDisks === true && layers.some(({ isReadOnly }) => !isReadOnly);
  const { PLAIN, SEALED, WITH_DISKS } = FILE_VERSIONS;
  const version = hasDisks ? WITH_DISKS : layers.length > 0 ? SEALED : PLAIN;
  const sidePath = sidePathOf(path, id, context.host);
  await setSave(images, id, path, 'writing');
  let isSaved = false;
  try {
    const fileBytes = await writeImage(context, { ...record, layers }, { sidePath, version });
    await link(sidePath, path).catch((cause: NodeJS.ErrnoException) => {
      if (cause.code === 'EEXIST') throw existing(path);
      throw fileFailure(path, 'written', cause);
    });
    await syncDirectory(dirname(path));
    isSaved = true;
    return { fileBytes };
  } catch (error) {
    throw asNoSpace(error);
  } finally {
    const isCleared = await rm(sidePath, { force: true }).then(
      () => true,
      (error: unknown) => {
        context.log.warn({ path: sidePath, err: toMigrationError(error) }, LEFT);
        return false;
      },
    );
    const after = isCleared || isSaved ? null : 'writing';
    await setSave(images, id, path, isSaved && version === SEALED ? 'saved' : after);
  }
}

/**
 * Removes what saves of an earlier daemon have left, which ended in the middle. What cannot be removed now, for example
 * because its file system does not answer, is left to a later start.
 */
export async function clearBrokenSaves(context: Pick<ImageContext, 'images' | 'host' | 'log'>): Promise<void> {
  const { images, host, log } = context;
  const broken = images.all().flatMap(({ id, saves = [] }) => {
    return saves.filter(({ state }) => state === 'writing').map(({ path }) => ({ id, path }));
  });
  // All are asked at once, because the daemon answers nobody before this has ended.
  const answers = new Map(
    [...new Set(broken.map(({ path }) => dirname(path)))].map((folder) => {
      const answer = fileSystemAnswers(folder).catch((error: unknown) => {
        log.warn({ folder, err: error }, LEFT);
        return 'none' as const;
      });
      return [folder, answer] as const;
    }),
  );
  for (const { id, path } of broken) {
    if ((await answers.get(dirname(path))) === 'none') continue;
    await clear(images, id, path, sidePathOf(path, id, host)).catch((error: unknown) => {
      log.warn({ image: id, path, err: toMigrationError(error) }, LEFT);
    });
  }
}

async function clear(images: ImageStore, id: string, path: string, sidePath: string): Promise<void> {
  await rm(sidePath, { force: true });
  // The link is the last step, so a file under the final name is complete.
  await setSave(images, id, path, (await isThere(path)) ? 'saved' : null);
}

/** The host's name is in it, so that no other daemon writes to the same file, and what exists is a leftover. */
function sidePathOf(path: string, id: string, host: string): string {
  return `${path}.${id}.${host}.part`;
}

/** Returns the image's layers with digests, and keeps them. Throws DISK_CHANGED if a layer is not as it was. */
async function knownLayers(context: ImageContext, id: string): Promise<readonly DiskLayer[]> {
  const { images } = context;
  await describeLayers(context, id);
  const record = images.get(id);
  const known = record.layers ?? [];
  const { layers, problem } = await checkLayers(known);
  if (problem !== null || !isDescribed(context, record)) {
    const reason = problem?.reason ?? 'it does not say what its disks were';
    throw new MigrationError('DISK_CHANGED', `image ${id} cannot be saved: ${reason}`, {
      remedy: `the image cannot be started any more; remove it: "vmctl image rm ${id}"`,
    });
  }
  const digested = await withDigests(layers);
  if (digested.length > 0) await images.update(id, { layers: digested });
  return digested;
}

async function setSave(images: ImageStore, id: string, path: string, state: SavedFile['state'] | null): Promise<void> {
  if (!images.has(id)) return;
  const { saves = [], ...record } = images.get(id);
  const others = saves.filter((save) => save.path !== path);
  const mine = state === null ? [] : [{ path, state }];
  const now = [...others, ...mine];
  await images.replace(id, now.length === 0 ? record : { ...record, saves: now });
}

async function writeImage(
  { images, signer }: ImageContext,
  record: ImageRecord,
  { sidePath, version }: { sidePath: string; version: FileVersion },
): Promise<number> {
  const file = await openNew(sidePath);
  try {
    const writer = new Writer(file, signer);
    // The overlays that the parent writes to, the other saved files and who reads the image are matters of this host.
    const { saves: _, readers: __, servedTo: ___, sharedWith: ____, ...told } = record;
    const { from: _____, layers = [], ...described } = told;
    const order = await images.touchOrder(record.id);
    const hasOrder = order.length > 0;
    await writer.begin(
      { version, hasOrder },
      { ...described, overlays: [], ...(layers.length === 0 ? {} : { layers }) },
    );
    await copyInto(writer, images.statePath(record.id), ENTRY.DEVICE_STATE, 0);
    if (hasOrder) await writer.whole(ENTRY.TOUCH_ORDER, encodeTouchOrder(record.spec.memory, order));
    for (const [region, { path: memory }] of (await images.regions(record)).entries()) {
      await copyInto(writer, memory, ENTRY.MEMORY, region);
    }
    if (version === FILE_VERSIONS.WITH_DISKS) {
      const files = layers.filter(({ isReadOnly }) => !isReadOnly).flatMap((layer) => layer.files);
      for (const [region, { path: disk }] of files.entries()) await copyInto(writer, disk, ENTRY.DISK, region);
    }
    const fileBytes = await writer.end();
    await file.sync();
    return fileBytes;
  } finally {
    await file.close();
  }
}

class Writer {
  readonly #file: FileHandle;
  readonly #signer: FileSigner | null;
  /** Of the headers after the signature. */
  readonly #hash = contentHash();
  #description = Buffer.alloc(0);
  #signatureAtBytes = 0;
  #entryCount = 0;
  #fileBytes = 0;

  constructor(file: FileHandle, signer: FileSigner | null) {
    this.#file = file;
    this.#signer = signer;
  }

  async begin(head: Pick<FileHead, 'version' | 'hasOrder'>, record: ImageRecord): Promise<void> {
    const text = Buffer.from(JSON.stringify(record));
    if (text.length > DESCRIPTION_BYTES_MAX) throw new MigrationError('UNSUPPORTED', 'the image has too many disks');
    const isSigned = this.#signer !== null;
    await this.#write(encodeHead({ ...head, isSigned, descriptionBytes: text.length }));
    await this.whole(ENTRY.DESCRIPTION, text);
    if (!isSigned) return;
    this.#description = text;
    this.#signatureAtBytes = this.#fileBytes;
    // Its place. What is signed is not known yet.
    await this.#write(Buffer.alloc(ENTRY_HEADER_BYTES + SIGNATURE_BYTES));
    this.#entryCount++;
  }

  async whole(kind: number, data: Buffer): Promise<void> {
    await this.entry({ kind, region: 0, offsetBytes: 0, lengthBytes: data.length }, data);
  }

  async entry(header: EntryHeader, data: Buffer): Promise<void> {
    const bytes = encodeEntry(header, data);
    if (this.#signatureAtBytes > 0) this.#hash.update(bytes);
    await this.#write(bytes);
    await this.#write(data);
    this.#entryCount++;
  }

  async end(): Promise<number> {
    await this.entry({ kind: ENTRY.END, region: 0, offsetBytes: this.#entryCount, lengthBytes: 0 }, Buffer.alloc(0));
    if (this.#signer !== null) await this.#writeSignature(this.#signer);
    return this.#fileBytes;
  }

  async #writeSignature(signer: FileSigner): Promise<void> {
    const data = signFile(signer, this.#description, this.#hash.digest('hex'));
    const header = encodeEntry({ kind: ENTRY.SIGNATURE, region: 0, offsetBytes: 0, lengthBytes: data.length }, data);
    const bytes = Buffer.concat([header, data]);
    for (let done = 0; done < bytes.length; ) {
      const place = this.#signatureAtBytes + done;
      done += (await this.#file.write(bytes, done, bytes.length - done, place)).bytesWritten;
    }
  }

  async #write(bytes: Buffer): Promise<void> {
    for (let done = 0; done < bytes.length; ) {
      const { bytesWritten } = await this.#file.write(bytes, done, bytes.length - done);
      done += bytesWritten;
    }
    this.#fileBytes += bytes.length;
  }
}

/** Writes the file's content as entries. Chunks of memory and disks that are all zeros are left out. */
async function copyInto(writer: Writer, path: string, kind: number, region: number): Promise<void> {
  const file = await (kind === ENTRY.DISK ? openUserFile(path, 'read') : open(path, 'r'));
  try {
    const buffer = Buffer.alloc(CHUNK_BYTES);
    for (let offsetBytes = 0; ; ) {
      const { bytesRead } = await file.read(buffer, 0, CHUNK_BYTES, offsetBytes);
      if (bytesRead === 0) return;
      const data = buffer.subarray(0, bytesRead);
      const isHole = kind !== ENTRY.DEVICE_STATE && data.equals(ZEROS.subarray(0, bytesRead));
      if (!isHole) await writer.entry({ kind, region, offsetBytes, lengthBytes: bytesRead }, data);
      offsetBytes += bytesRead;
    }
  } finally {
    await file.close();
  }
}

/** Replaces a leftover: no other save can be writing the file, because the caller holds the image. */
async function openNew(path: string): Promise<FileHandle> {
  await rm(path, { force: true });
  return open(path, 'wx', 0o600).catch((cause: NodeJS.ErrnoException) => {
    const isMissing = cause.code === 'ENOENT' || cause.code === 'ENOTDIR';
    if (isMissing) throw new MigrationError('NOT_FOUND', `there is no folder ${dirname(path)}`, { cause });
    throw fileFailure(path, 'written', cause);
  });
}

async function refuseExisting(path: string): Promise<void> {
  if (await isThere(path)) throw existing(path);
}

function existing(path: string): MigrationError {
  return new MigrationError('CONFLICT', `${path} exists`, { remedy: 'use another name, or remove that file first' });
}

async function isThere(path: string): Promise<boolean> {
  return access(path, constants.F_OK).then(
    () => true,
    () => false,
  );
}

export function asNoSpace(error: unknown): unknown {
  const { code } = error as NodeJS.ErrnoException;
  if (code !== 'ENOSPC' && code !== 'EDQUOT') return error;
  return new MigrationError('NO_SPACE', 'no space for the image', { cause: error });
}

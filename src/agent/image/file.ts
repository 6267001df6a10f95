/**
 * Saves an image to a file and loads it again, on this or another host. It is not optimized for speed: no VM waits for
 * the bytes, which pass through this process a mebibyte at a time. Nothing in a file is trusted. If a file is damaged,
 * everything that was loaded from it is removed.
 */
import { type FileHandle, link, open, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import { syncDirectory } from '../../durable/durable-file.js';
import { fileSystemAnswers, openUserFile } from '../../kit/user-file.js';
import type { ImageContext } from './context.js';
import {
  CHUNK_BYTES,
  damaged,
  decodeEntry,
  decodeHead,
  ENTRY,
  ENTRY_HEADER_BYTES,
  type EntryHeader,
  encodeEntry,
  encodeHead,
  HEAD_BYTES,
  isIntact,
  STATE_BYTES_MAX,
} from './file-format.js';
import { type ImageRecord, imageRecordSchema } from './record.js';

const ZEROS = Buffer.alloc(CHUNK_BYTES);

/** Creates the whole file or none. Throws CONFLICT if the file exists or the image is not complete. */
export async function saveImage(context: ImageContext, id: string, path: string): Promise<{ fileBytes: number }> {
  const { images } = context;
  const record = images.get(id);
  if (record.state !== 'complete') throw new MigrationError('CONFLICT', `image ${id} is ${record.state}`);
  if (!path.startsWith('/')) throw new MigrationError('USAGE', 'the path of an image file must be absolute');
  await fileSystemAnswers(dirname(path));
  const sidePath = `${path}.${id}.part`;
  const file = await openNew(sidePath);
  try {
    const writer = new Writer(file);
    // The overlays that the parent writes to are not part of the image.
    await writer.begin({ ...record, overlays: [] });
    await copyInto(writer, images.statePath(id), ENTRY.DEVICE_STATE, 0);
    for (const [region, { path: memory }] of (await images.regions(record)).entries()) {
      await copyInto(writer, memory, ENTRY.MEMORY, region);
    }
    const fileBytes = await writer.end();
    await file.sync();
    await link(sidePath, path).catch((cause: NodeJS.ErrnoException) => {
      throw new MigrationError(cause.code === 'EEXIST' ? 'CONFLICT' : 'INTERNAL', `${path}: ${cause.message}`, {
        cause,
      });
    });
    return { fileBytes };
  } catch (error) {
    throw asNoSpace(error);
  } finally {
    await file.close();
    await rm(sidePath, { force: true });
    await syncDirectory(dirname(path));
  }
}

/**
 * Loads an image and returns its id. Throws CONFLICT if this host has the image already, CORRUPT or SPEC_INVALID if the
 * file is not as `saveImage` has written it.
 */
export async function loadImage(context: ImageContext, path: string): Promise<string> {
  const { images, vms } = context;
  const file = await openUserFile(path, 'read').catch((cause: unknown) => {
    if (cause instanceof MigrationError) throw cause;
    throw new MigrationError('NOT_FOUND', `no image file ${path}`, { cause });
  });
  try {
    const reader = new Reader(file);
    const described = await reader.begin();
    const { id } = described;
    if (images.has(id)) throw new MigrationError('CONFLICT', `image ${id} is already on ${context.host}`);
    const { machines, version } = await vms.backend.installed();
    if (!machines.includes(described.spec.machine)) {
      throw new MigrationError('UNSUPPORTED', `QEMU ${version} has no machine ${described.spec.machine}`);
    }
    for (const disk of described.disks) await checkDiskOpens(disk.path);
    const freeBytes = await images.bytesFree();
    const neededBytes = (await file.stat()).size;
    if (neededBytes > freeBytes) {
      throw new MigrationError(
        'NO_SPACE',
        `image ${id} needs up to ${neededBytes} bytes, ${freeBytes} are free for images`,
      );
    }
    await images.create({ ...described, state: 'capturing', overlays: [] }, null);
    try {
      const deviceStateBytes = await reader.rest(described, {
        state: images.statePath(id),
        regions: (await images.regions(described)).map((region) => region.path),
      });
      await images.update(id, { state: 'complete', deviceStateBytes });
    } catch (error) {
      await images.delete(id);
      throw asNoSpace(error);
    }
    return id;
  } finally {
    await file.close();
  }
}

class Writer {
  readonly #file: FileHandle;
  #entryCount = 0;
  #fileBytes = 0;

  constructor(file: FileHandle) {
    this.#file = file;
  }

  async begin(record: ImageRecord): Promise<void> {
    const text = Buffer.from(JSON.stringify(record));
    await this.#write(encodeHead(text.length));
    await this.entry({ kind: ENTRY.DESCRIPTION, region: 0, offsetBytes: 0, lengthBytes: text.length }, text);
  }

  async entry(header: EntryHeader, data: Buffer): Promise<void> {
    await this.#write(encodeEntry(header, data));
    await this.#write(data);
    this.#entryCount++;
  }

  async end(): Promise<number> {
    const header = { kind: ENTRY.END, region: 0, offsetBytes: this.#entryCount, lengthBytes: 0 };
    await this.#write(encodeEntry(header, Buffer.alloc(0)));
    return this.#fileBytes;
  }

  async #write(bytes: Buffer): Promise<void> {
    for (let done = 0; done < bytes.length; ) {
      const { bytesWritten } = await this.#file.write(bytes, done, bytes.length - done);
      done += bytesWritten;
    }
    this.#fileBytes += bytes.length;
  }
}

class Reader {
  readonly #file: FileHandle;
  #entryCount = 0;

  constructor(file: FileHandle) {
    this.#file = file;
  }

  async begin(): Promise<ImageRecord> {
    const descriptionBytes = decodeHead(await this.#read(HEAD_BYTES));
    const { header, data } = await this.#entry();
    if (header.kind !== ENTRY.DESCRIPTION || data.length !== descriptionBytes)
      throw damaged('the description is missing');
    const parsed = imageRecordSchema.safeParse(parseJson(data));
    if (!parsed.success) throw damaged('the description is not a valid image record');
    const { state, spec } = parsed.data;
    if (state !== 'complete' || spec.memory.backing !== 'shared')
      throw damaged('its record is not that of a complete image');
    return parsed.data;
  }

  /** Writes all entries to their files and returns the length of the device state. */
  async rest({ spec }: ImageRecord, paths: { state: string; regions: readonly string[] }): Promise<number> {
    const lengths = [STATE_BYTES_MAX, ...spec.memory.regions.map(({ lengthBytes }) => lengthBytes)];
    const files: FileHandle[] = [];
    try {
      for (const path of [paths.state, ...paths.regions]) files.push(await open(path, 'r+'));
      let last = { target: 0, endBytes: 0 };
      let stateBytes = 0;
      for (;;) {
        const { header, data } = await this.#entry();
        if (header.kind === ENTRY.END) break;
        const target = header.kind === ENTRY.DEVICE_STATE ? 0 : header.region + 1;
        const isState = target === 0 && header.region === 0 && header.offsetBytes === stateBytes;
        const isMemory = header.kind === ENTRY.MEMORY && target < files.length;
        const endBytes = header.offsetBytes + header.lengthBytes;
        const isInOrder = target > last.target || (target === last.target && header.offsetBytes >= last.endBytes);
        if (!(isState || isMemory) || !isInOrder || endBytes > (lengths[target] ?? 0))
          throw damaged('an entry is misplaced');
        if (target === 0) stateBytes = endBytes;
        last = { target, endBytes };
        const { bytesWritten } = (await files[target]?.write(data, 0, data.length, header.offsetBytes)) ?? {
          bytesWritten: 0,
        };
        if (bytesWritten !== data.length)
          throw new MigrationError(
            'NO_SPACE',
            `no space for the memory of the image in ${dirname(paths.regions[0] ?? '')}`,
          );
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
    if (header.kind === ENTRY.END && header.offsetBytes !== this.#entryCount) throw damaged('entries are missing');
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

/** Writes the file's content as entries. Chunks of memory that are all zeros are left out. */
async function copyInto(writer: Writer, path: string, kind: number, region: number): Promise<void> {
  const file = await open(path, 'r');
  try {
    const { size } = await file.stat();
    const buffer = Buffer.alloc(CHUNK_BYTES);
    for (let offsetBytes = 0; offsetBytes < size; offsetBytes += CHUNK_BYTES) {
      const { bytesRead } = await file.read(buffer, 0, Math.min(CHUNK_BYTES, size - offsetBytes), offsetBytes);
      const data = buffer.subarray(0, bytesRead);
      if (kind === ENTRY.MEMORY && data.equals(ZEROS.subarray(0, bytesRead))) continue;
      await writer.entry({ kind, region, offsetBytes, lengthBytes: bytesRead }, data);
    }
  } finally {
    await file.close();
  }
}

async function openNew(path: string): Promise<FileHandle> {
  return open(path, 'wx', 0o600).catch((cause: NodeJS.ErrnoException) => {
    throw new MigrationError(cause.code === 'EEXIST' ? 'CONFLICT' : 'NOT_PERMITTED', `${path}: ${cause.message}`, {
      cause,
    });
  });
}

async function checkDiskOpens(path: string): Promise<void> {
  const disk = await openUserFile(path, 'read').catch((cause: unknown) => {
    throw new MigrationError('NOT_FOUND', `the image needs the disk ${path}, which cannot be opened`, { cause });
  });
  await disk.close();
}

function parseJson(data: Buffer): unknown {
  try {
    return JSON.parse(data.toString('utf8'));
  } catch {
    return null;
  }
}

function asNoSpace(error: unknown): unknown {
  if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') return error;
  return new MigrationError('NO_SPACE', 'no space for the image', { cause: error });
}

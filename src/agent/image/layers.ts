/**
 * The disk layers of an image: the files that its disks consisted of at the fork point, the top first and then their
 * backing files. Read-only drives that no disk of the spec is (a CD, the code of a firmware) count too, after the
 * disks. Writable ones do not occur, because their VM cannot be forked. Memory of one moment over disks of another
 * damages file systems in silence, so every start from an image checks its layers first.
 *
 * A layer is proven in one of two ways. The stamp (size, inode, times of change) costs one `stat` and counts on the
 * host that took it. The digest covers all of the content and counts everywhere. It costs one read of the file, so it
 * is computed when an image is saved, and compared when the stamp does not fit.
 */
import { createHash } from 'node:crypto';
import type { FileHandle } from 'node:fs/promises';
import type { DiskFiles } from '../../backends/disk-files.js';
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import type { DiskFormat, DiskSpec } from '../../domain/vm.js';
import { openUserFile } from '../../kit/user-file.js';

/** The state of a file on the host that took the stamp. Decimal numbers, because JSON has none of 64 bits. */
export interface FileStamp {
  readonly inode: string;
  readonly mtimeNs: string;
  /** Also changes with the file's mode and names, so a different value proves nothing. */
  readonly ctimeNs: string;
}

export interface LayerFile {
  readonly path: string;
  readonly format: DiskFormat;
  readonly sizeBytes: number;
  /** Null for a block device, which has no times of change, and for a file of another host. */
  readonly stamp: FileStamp | null;
  /** SHA-256 of the content (`digestOf`). Null until the image is saved. */
  readonly digest: string | null;
}

export interface DiskLayer {
  /** The id of the disk. Of a drive that the back end's own arguments name: the argument and the path. */
  readonly id: string;
  readonly isReadOnly: boolean;
  readonly files: readonly LayerFile[];
}

const CHUNK_BYTES = 1024 * 1024;
const ZEROS = Buffer.alloc(CHUNK_BYTES);
/** What `withFile` throws because of what lies under the path. Any other error says nothing about the file. */
const OF_THE_FILE: ReadonlySet<ErrorCode> = new Set(['NOT_FOUND', 'NOT_PERMITTED', 'USAGE']);

/** Describes the files of these disks as they are now. No VM writes to them any more. Throws NOT_FOUND. */
export async function sealDisks(files: DiskFiles, disks: readonly DiskSpec[]): Promise<DiskLayer[]> {
  return Promise.all(
    disks.map(async ({ id, path, format, isReadOnly }) => {
      const chain = await files.chain(path, format);
      return { id, isReadOnly, files: await Promise.all(chain.map((file) => sealFile(file.path, file.format))) };
    }),
  );
}

async function sealFile(path: string, format: DiskFormat): Promise<LayerFile> {
  return withFile(path, async (file) => ({ path, format, digest: null, ...(await stampOf(file)) }));
}

/** Returns the layers with the digest of each file that has none. Throws CONFLICT if a file changes meanwhile. */
export async function withDigests(layers: readonly DiskLayer[]): Promise<DiskLayer[]> {
  const result: DiskLayer[] = [];
  for (const layer of layers) {
    const files: LayerFile[] = [];
    for (const file of layer.files) files.push({ ...file, digest: file.digest ?? (await stableDigest(file)) });
    result.push({ ...layer, files });
  }
  return result;
}

/** The outcome of a check: the layers with stamps of this host, or the reason why a start is refused. */
export type LayerCheck =
  | { readonly layers: readonly DiskLayer[]; readonly problem: null }
  | { readonly layers: null; readonly problem: LayerProblem };

export interface LayerProblem {
  readonly isMissing: boolean;
  readonly isReadOnly: boolean;
  readonly reason: string;
}

/** Compares each file with what it was. A digest is computed only for a file whose stamp does not fit. */
export async function checkLayers(layers: readonly DiskLayer[]): Promise<LayerCheck> {
  const result: DiskLayer[] = [];
  for (const layer of layers) {
    const files: LayerFile[] = [];
    for (const file of layer.files) {
      const outcome = await checkFile(file);
      if ('reason' in outcome) {
        const { id, isReadOnly } = layer;
        const what = id.startsWith('-') ? id : `disk ${id}`;
        return { layers: null, problem: { ...outcome, isReadOnly, reason: `${what}: ${outcome.reason}` } };
      }
      files.push(outcome);
    }
    result.push({ ...layer, files });
  }
  return { layers: result, problem: null };
}

/** Returns the file with its stamp on this host, or the reason why it is not the file of the image's moment. */
async function checkFile(file: LayerFile): Promise<LayerFile | { isMissing: boolean; reason: string }> {
  const { path, digest, stamp } = file;
  const changed = (reason: string) => ({ isMissing: false, reason });
  try {
    return await withFile(path, async (opened) => {
      const now = await stampOf(opened);
      if (now.sizeBytes !== file.sizeBytes) return changed(`${path} has ${now.sizeBytes} bytes, not ${file.sizeBytes}`);
      if (stamp !== null && isSame(stamp, now.stamp, digest !== null)) return file;
      // A block device that was never saved is protected by its lock alone.
      if (digest === null && stamp === null && now.stamp === null) return file;
      if (digest === null) return changed(`${path} has been written since the image was made, or replaced`);
      if ((await digestOf(opened)) !== digest) return changed(`${path} has another content than at the image's moment`);
      return { ...file, stamp: now.stamp };
    });
  } catch (error) {
    if (!isOfTheFile(error)) throw error;
    return { isMissing: error.code === 'NOT_FOUND', reason: error.message };
  }
}

/** Without a digest to fall back on, ctime is left out: a changed mode must not make an image useless. */
function isSame(before: FileStamp, now: FileStamp | null, hasDigest: boolean): boolean {
  if (now === null || before.inode !== now.inode || before.mtimeNs !== now.mtimeNs) return false;
  return !hasDigest || before.ctimeNs === now.ctimeNs;
}

/**
 * Returns the digest of a file's content. It covers each mebibyte that is not all zeros with its offset, and the
 * length, so the holes of a sparse file cost no hashing.
 */
export async function digestOf(file: FileHandle): Promise<string> {
  const hash = createHash('sha256');
  const buffer = Buffer.alloc(CHUNK_BYTES);
  const offset = Buffer.alloc(8);
  let offsetBytes = 0;
  for (;;) {
    const lengthBytes = await readChunk(file, buffer, offsetBytes);
    offset.writeBigUInt64LE(BigInt(offsetBytes));
    if (lengthBytes === 0) return hash.update(offset).digest('hex');
    const data = buffer.subarray(0, lengthBytes);
    if (!data.equals(ZEROS.subarray(0, lengthBytes))) hash.update(offset).update(data);
    offsetBytes += lengthBytes;
  }
}

async function stableDigest({ path, sizeBytes, stamp }: LayerFile): Promise<string> {
  return withFile(path, async (file) => {
    const digest = await digestOf(file);
    const after = await stampOf(file);
    if (after.sizeBytes === sizeBytes && (stamp === null || isSame(stamp, after.stamp, false))) return digest;
    throw new MigrationError('CONFLICT', `${path} has been written while it was read`);
  });
}

/** Fills the buffer, except at the end of the file. */
async function readChunk(file: FileHandle, buffer: Buffer, offsetBytes: number): Promise<number> {
  let done = 0;
  while (done < buffer.length) {
    const { bytesRead } = await file.read(buffer, done, buffer.length - done, offsetBytes + done);
    if (bytesRead === 0) break;
    done += bytesRead;
  }
  return done;
}

async function stampOf(file: FileHandle): Promise<Pick<LayerFile, 'sizeBytes' | 'stamp'>> {
  const { size, ino, mtimeNs, ctimeNs } = await file.stat({ bigint: true });
  const isFile = (await file.stat()).isFile();
  const stamp = { inode: String(ino), mtimeNs: String(mtimeNs), ctimeNs: String(ctimeNs) };
  return { sizeBytes: Number(size), stamp: isFile ? stamp : null };
}

/** True if `withFile` has thrown the error because of what lies under the path, so that trying again is of no use. */
export function isOfTheFile(error: unknown): error is MigrationError {
  return error instanceof MigrationError && OF_THE_FILE.has(error.code);
}

/**
 * Throws NOT_FOUND, NOT_PERMITTED or USAGE because of what lies under the path. Otherwise TIMEOUT if its file system
 * does not answer, OUT_OF_MEMORY if a limit of the host is met, and IO_FAILED if the system cannot read the file.
 */
export async function withFile<T>(path: string, work: (file: FileHandle) => Promise<T>): Promise<T> {
  const file = await openUserFile(path, 'read').catch((cause: unknown) => {
    throw fileFailure(path, 'opened', cause);
  });
  try {
    return await work(file);
  } catch (error) {
    // A call on a handle knows no path. Other files that the work uses are named by their own errors.
    const { syscall, path: named } = error as NodeJS.ErrnoException;
    const isOfHandle = named === undefined && (syscall === 'read' || syscall === 'fstat');
    throw isOfHandle ? fileFailure(path, 'read', error) : error;
  } finally {
    await file.close();
  }
}

/** Errors of the system that come from the name and the mode of a file. */
const BY_ERRNO: Readonly<Record<string, ErrorCode>> = {
  ...{ ENOENT: 'NOT_FOUND', ENOTDIR: 'NOT_FOUND' },
  ...{ EACCES: 'NOT_PERMITTED', EPERM: 'NOT_PERMITTED', ELOOP: 'NOT_PERMITTED', ENAMETOOLONG: 'NOT_PERMITTED' },
};

/** Returns the error of a file that could not be opened, read or written. A limit of the host stays that limit. */
export function fileFailure(path: string, what: 'opened' | 'read' | 'written', cause: unknown): MigrationError {
  if (cause instanceof MigrationError) return cause;
  const known = BY_ERRNO[String((cause as NodeJS.ErrnoException).code)];
  if (known === 'NOT_FOUND') return new MigrationError(known, `there is no ${path}`, { cause });
  const { code, message, remedy, details } = toMigrationError(cause, known ?? 'IO_FAILED');
  const ioRemedy = code === 'IO_FAILED' ? `look at the disk or file server that ${path} is on, then try again` : null;
  const advice = remedy ?? ioRemedy;
  return new MigrationError(code, `${path} cannot be ${what}: ${message}`, {
    ...{ cause, details },
    ...(advice === null ? {} : { remedy: advice }),
  });
}

/** Digests of files that a VM only reads. Two hosts may have copies of such a file if the content is the same. */
import { createHash } from 'node:crypto';
import type { FileHandle } from 'node:fs/promises';

/** A shorter file is read whole. Of a longer one samples are read, evenly spread, with its first and last bytes. */
export const WHOLE_BYTES_MAX = 64 * 2 ** 20;
const SAMPLES = 64;
const SAMPLE_BYTES = 64 * 1024;
const READ_BYTES = 2 ** 20;
const CACHED_MAX = 256;

export interface ContentDigest {
  readonly digest: string;
  readonly isSampled: boolean;
}

/** Digests of unchanged files, by inode, size and times. A kernel is not read again for each move. */
const cached = new Map<string, string>();

/**
 * Returns the digest of the content, keyed by `key`, so that it tells nothing to a peer that does not have the content
 * itself. `version` names the file and its content as of now.
 */
export async function contentDigest(
  file: FileHandle,
  sizeBytes: number,
  version: string,
  key: string,
): Promise<ContentDigest> {
  const isSampled = sizeBytes > WHOLE_BYTES_MAX;
  let plain = cached.get(version);
  if (plain === undefined) {
    plain = await digestOf(file, sizeBytes, isSampled);
    if (cached.size >= CACHED_MAX) cached.clear();
    cached.set(version, plain);
  }
  return { digest: createHash('sha256').update(`${key}/${plain}`).digest('hex'), isSampled };
}

async function digestOf(file: FileHandle, sizeBytes: number, isSampled: boolean): Promise<string> {
  const hash = createHash('sha256').update(`${sizeBytes}/`);
  const buffer = Buffer.alloc(isSampled ? SAMPLE_BYTES : Math.min(READ_BYTES, Math.max(sizeBytes, 1)));
  const offsets = isSampled
    ? Array.from({ length: SAMPLES }, (_, index) => Math.floor(((sizeBytes - SAMPLE_BYTES) * index) / (SAMPLES - 1)))
    : Array.from({ length: Math.ceil(sizeBytes / READ_BYTES) }, (_, index) => index * READ_BYTES);
  for (const offset of offsets) {
    const { bytesRead } = await file.read(buffer, 0, buffer.length, offset);
    hash.update(buffer.subarray(0, bytesRead));
  }
  return hash.digest('hex');
}

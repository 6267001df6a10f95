/**
 * Which host of the cluster has written an image's file. The signature stands before the content, so that a reader
 * knows whom it trusts before it opens what the description names; the writer puts it there when the content is known.
 * It covers the description, and a digest of the headers of all entries after it, which have the content's checksums.
 */
import { createHash, type Hash } from 'node:crypto';
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import type { HostSignature } from '../../domain/signature.js';
import { damaged } from './file-format.js';

/** The length of the entry, whatever is in it, because its place is kept free. The rest is blanks. */
export const SIGNATURE_BYTES = 32 * 1024;
const PURPOSE = 'vmigrate image file 1\0';

/** Signs for this host, and knows whose signatures are those of hosts of the cluster. */
export interface FileSigner {
  sign(bytes: Buffer): HostSignature;
  /** Returns the name of the host that has signed the bytes, or null. */
  signerOf(signature: HostSignature, bytes: Buffer): string | null;
}

const entry = z.strictObject({
  /** SHA-256 of the headers of all entries after this one, as hexadecimal. */
  contentDigest: z.string().regex(/^[0-9a-f]{64}$/),
  by: z.strictObject({ certificate: z.string(), signature: z.string() }),
});
export type FileSignature = z.output<typeof entry>;

/** Counts the headers after the signature. */
export function contentHash(): Hash {
  return createHash('sha256');
}

export function signFile(signer: FileSigner, description: Buffer, contentDigest: string): Buffer {
  const by = signer.sign(signedBytes(description, contentDigest));
  const text = Buffer.from(JSON.stringify({ contentDigest, by } satisfies FileSignature));
  if (text.length > SIGNATURE_BYTES)
    throw new MigrationError('UNSUPPORTED', 'the certificate of this host is too long to sign the file of an image');
  return Buffer.concat([text, Buffer.alloc(SIGNATURE_BYTES - text.length, ' ')]);
}

export function parseSignature(data: Buffer): FileSignature {
  try {
    return entry.parse(JSON.parse(data.toString('utf8')));
  } catch {
    throw damaged('its signature is not one');
  }
}

/** Returns the host that has signed the description and the content of this digest, or null. */
export function signerOfFile(
  signer: FileSigner,
  description: Buffer,
  { contentDigest, by }: FileSignature,
): string | null {
  return signer.signerOf(by, signedBytes(description, contentDigest));
}

function signedBytes(description: Buffer, contentDigest: string): Buffer {
  const digest = createHash('sha256').update(description).digest();
  return Buffer.concat([Buffer.from(PURPOSE, 'latin1'), digest, Buffer.from(contentDigest, 'hex')]);
}

/**
 * An image in one file:
 *
 *   head        16 bytes   magic "VMGIMAGE", u32 version, u32 length of the description
 *   description            JSON: the image's record
 *   signature              if the version says so: of the description, and of the headers of all entries after it
 *   entries                each a header of 56 bytes and its data
 *   end                    an entry without data, whose offset is the number of entries before it
 *
 *   entry header           u32 kind, u32 region, u64 offset, u32 length, u32 zero,
 *                          32 bytes SHA-256 of the 24 bytes before it and the data
 *
 * Integers are little-endian. The description is also the data of the first entry, so that a checksum covers
 * everything. Memory and disk content that no entry covers is zeros. Entries are in the order of device state, order of
 * touches, memory and disks, and of regions and offsets, and do not overlap. The region of a disk's entry counts the
 * files of all writable disks. Nothing follows the end.
 *
 * The version says what the file knows of the disks: 1 their paths only (no disks, or a file of build 0.1.0), 2 the
 * digests of their layers, 3 also the content of the writable ones. To this 256 is added if the file may have an order
 * of touches (touch-order.ts), and 512 if it is signed (file-signature.ts), so that a build that does not know these
 * entries says which format it does not read. A damaged file is refused; an order that is whole and not one of this
 * image is passed over.
 */
import { createHash } from 'node:crypto';
import { MigrationError } from '../../domain/errors.js';

export const MAGIC = Buffer.from('VMGIMAGE', 'latin1');
export const FILE_VERSIONS = { PLAIN: 1, SEALED: 2, WITH_DISKS: 3 } as const;
export type FileVersion = (typeof FILE_VERSIONS)[keyof typeof FILE_VERSIONS];
const WITH_ORDER = 256;
const WITH_SIGNATURE = 512;
export const HEAD_BYTES = 16;
export const ENTRY_HEADER_BYTES = 56;
/** The maximum of one entry's data. */
export const CHUNK_BYTES = 1024 * 1024;
export const DESCRIPTION_BYTES_MAX = 1024 * 1024;
export const STATE_BYTES_MAX = 256 * 1024 * 1024;
const CHECKED_BYTES = 24;

/** The kinds of entries. Zero is not a kind. */
export const ENTRY = {
  DESCRIPTION: 1,
  DEVICE_STATE: 2,
  MEMORY: 3,
  END: 4,
  DISK: 5,
  TOUCH_ORDER: 6,
  SIGNATURE: 7,
} as const;

export interface EntryHeader {
  readonly kind: number;
  readonly region: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
}

export interface FileHead {
  readonly version: FileVersion;
  /** The file may have an order of touches. */
  readonly hasOrder: boolean;
  readonly isSigned: boolean;
  readonly descriptionBytes: number;
}

export function encodeHead({ version, hasOrder, isSigned, descriptionBytes }: FileHead): Buffer {
  const head = Buffer.alloc(HEAD_BYTES);
  MAGIC.copy(head);
  head.writeUInt32LE(version + (hasOrder ? WITH_ORDER : 0) + (isSigned ? WITH_SIGNATURE : 0), 8);
  head.writeUInt32LE(descriptionBytes, 12);
  return head;
}

/** Throws SPEC_INVALID if the file is not an image that this build reads. */
export function decodeHead(head: Buffer): FileHead {
  if (head.length < HEAD_BYTES || !head.subarray(0, MAGIC.length).equals(MAGIC)) {
    throw new MigrationError('SPEC_INVALID', 'the file is not an image');
  }
  const number = head.readUInt32LE(8);
  const isSigned = (number & WITH_SIGNATURE) !== 0;
  const hasOrder = (number & WITH_ORDER) !== 0;
  const rest = number - (hasOrder ? WITH_ORDER : 0) - (isSigned ? WITH_SIGNATURE : 0);
  const version = Object.values(FILE_VERSIONS).find((known) => known === rest);
  if (version === undefined) {
    throw new MigrationError('SPEC_INVALID', `the image has format ${number}, which this build does not read`);
  }
  const descriptionBytes = head.readUInt32LE(12);
  if (descriptionBytes === 0 || descriptionBytes > DESCRIPTION_BYTES_MAX) {
    throw damaged('the description has an invalid length');
  }
  return { version, hasOrder, isSigned, descriptionBytes };
}

export function encodeEntry(header: EntryHeader, data: Buffer): Buffer {
  const bytes = Buffer.alloc(ENTRY_HEADER_BYTES);
  bytes.writeUInt32LE(header.kind, 0);
  bytes.writeUInt32LE(header.region, 4);
  bytes.writeBigUInt64LE(BigInt(header.offsetBytes), 8);
  bytes.writeUInt32LE(header.lengthBytes, 16);
  checksum(bytes, data).copy(bytes, CHECKED_BYTES);
  return bytes;
}

/** Throws CORRUPT for invalid numbers. The caller checks the checksum with `isIntact` when it has the data. */
export function decodeEntry(bytes: Buffer): EntryHeader {
  const kind = bytes.readUInt32LE(0);
  const offsetBytes = Number(bytes.readBigUInt64LE(8));
  const lengthBytes = bytes.readUInt32LE(16);
  const isKnown = kind >= ENTRY.DESCRIPTION && kind <= ENTRY.SIGNATURE;
  const isSane = Number.isSafeInteger(offsetBytes) && lengthBytes <= CHUNK_BYTES && bytes.readUInt32LE(20) === 0;
  if (!isKnown || !isSane || (kind === ENTRY.END) !== (lengthBytes === 0)) throw damaged('an entry header is invalid');
  return { kind, region: bytes.readUInt32LE(4), offsetBytes, lengthBytes };
}

export function isIntact(header: Buffer, data: Buffer): boolean {
  return checksum(header, data).equals(header.subarray(CHECKED_BYTES, ENTRY_HEADER_BYTES));
}

export function damaged(how: string): MigrationError {
  return new MigrationError('CORRUPT', `the image file is damaged: ${how}`);
}

function checksum(header: Buffer, data: Buffer): Buffer {
  return createHash('sha256').update(header.subarray(0, CHECKED_BYTES)).update(data).digest();
}

/**
 * The frames of a record log, one a line:
 *
 *   ">" length (8 hex digits) "~" CRC-32 of those 8 digits, " " CRC-32 of the JSON, " " JSON, newline
 *
 * The length has a checksum of its own. So a frame that is shorter than its length says is a torn append, and a frame
 * that is all there but does not match is damage: a crash leaves a prefix of the last frame, or zeros in place of its
 * end, and nothing else.
 */
import { crc32 } from 'node:zlib';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { corrupt } from './sealed.js';

const HEAD_BYTES = '>00000000~00000000 00000000 '.length;
const HEAD = /^>([0-9a-f]{8})~([0-9a-f]{8}) ([0-9a-f]{8}) $/;
const NEWLINE = 0x0a;

export function encodeFrame(json: string): Buffer {
  const length = Buffer.byteLength(json).toString(16).padStart(8, '0');
  return Buffer.from(`>${length}~${checksum(length)} ${checksum(json)} ${json}\n`);
}

export interface Frames<T> {
  readonly records: T[];
  /** The length of all whole frames. The bytes behind them are a torn append. */
  readonly wholeBytes: number;
}

/**
 * Decodes all frames. Throws CORRUPT, with the line's number, for a whole frame that is damaged, and what `decode`
 * throws as CORRUPT, too. Never throws for a torn end.
 */
export function decodeFrames<T>(bytes: Buffer, decode: (json: unknown) => T, path: string): Frames<T> {
  const records: T[] = [];
  let at = 0;
  while (at < bytes.length) {
    const where = `${path}:${records.length + 1}`;
    const frame = nextFrame(bytes, at, where);
    if (frame === 'torn') break;
    records.push(decoded(frame.json, decode, where));
    at = frame.endBytes;
  }
  return { records, wholeBytes: at };
}

function nextFrame(bytes: Buffer, at: number, where: string): 'torn' | { json: Buffer; endBytes: number } {
  const endOfData = bytes.length - trailingZeros(bytes, at);
  const headBytes = Math.min(HEAD_BYTES, endOfData - at);
  const head = bytes.toString('latin1', at, at + headBytes);
  if (headBytes < HEAD_BYTES) {
    if (isPrefixOfHead(head)) return 'torn';
    throw corrupt(`${where}: the line is damaged`);
  }
  const match = HEAD.exec(head);
  if (match === null || checksum(match[1] ?? '') !== match[2]) throw corrupt(`${where}: the line's length is damaged`);
  const endBytes = at + HEAD_BYTES + Number.parseInt(match[1] ?? '', 16) + 1;
  if (endBytes > endOfData) return 'torn';
  const json = bytes.subarray(at + HEAD_BYTES, endBytes - 1);
  if (bytes[endBytes - 1] !== NEWLINE) throw corrupt(`${where}: the line has no end`);
  if (checksum(json) !== match[3]) throw corrupt(`${where}: the line does not match its checksum`);
  return { json, endBytes };
}

function isPrefixOfHead(head: string): boolean {
  const sample = '>00000000~00000000 00000000 '.slice(0, head.length);
  return head.replace(/[0-9a-f]/g, '0') === sample;
}

/** A file system may have recorded the length of an append before its data. JSON holds no zero byte. */
function trailingZeros(bytes: Buffer, from: number): number {
  let end = bytes.length;
  while (end > from && bytes[end - 1] === 0) end--;
  return bytes.length - end;
}

function decoded<T>(json: Buffer, decode: (json: unknown) => T, where: string): T {
  try {
    return decode(JSON.parse(json.toString('utf8')));
  } catch (error) {
    const { message, code } = toMigrationError(error);
    if (code === 'UNSUPPORTED') throw error;
    throw new MigrationError('CORRUPT', `${where}: ${message}`, { cause: error });
  }
}

function checksum(data: string | Buffer): string {
  return crc32(data).toString(16).padStart(8, '0');
}

/** A part of a damaged log: an intact record, or bytes that are none. */
export type Piece<T> =
  | { readonly kind: 'record'; readonly line: number; readonly record: T; readonly frame: Buffer }
  | { readonly kind: 'damaged'; readonly line: number; readonly text: string; readonly error: MigrationError }
  | { readonly kind: 'torn'; readonly line: number };

/**
 * Decodes what is left of a damaged log, for check and repair. After a frame whose length cannot be trusted, it goes on
 * behind the next newline.
 */
export function decodePieces<T>(bytes: Buffer, decode: (json: unknown) => T, path: string): Piece<T>[] {
  const pieces: Piece<T>[] = [];
  let at = 0;
  for (let line = 1; at < bytes.length; line++) {
    const where = `${path}:${line}`;
    try {
      const frame = nextFrame(bytes, at, where);
      if (frame === 'torn') {
        pieces.push({ kind: 'torn', line });
        return pieces;
      }
      const record = decoded(frame.json, decode, where);
      pieces.push({ kind: 'record', line, record, frame: bytes.subarray(at, frame.endBytes) });
      at = frame.endBytes;
    } catch (thrown) {
      const newline = bytes.indexOf(NEWLINE, at);
      const end = newline < 0 ? bytes.length : newline + 1;
      pieces.push({ kind: 'damaged', line, text: bytes.toString('utf8', at, end), error: toMigrationError(thrown) });
      at = end;
    }
  }
  return pieces;
}

/**
 * Decodes a log of build 0.1.0: lines `CRC32 JSON\n`, of which a crash may have cut the last one short. Returns the
 * texts of its records. Throws CORRUPT for a line that does not match its checksum.
 */
export function decodeOldLines(bytes: Buffer, path: string): string[] {
  const lengthBytes = bytes.lastIndexOf(NEWLINE) + 1;
  const lines = lengthBytes === 0 ? [] : bytes.toString('utf8', 0, lengthBytes - 1).split('\n');
  return lines.map((line, index) => {
    const json = line.slice(9);
    if (line[8] === ' ' && line.slice(0, 8) === checksum(json)) return json;
    throw corrupt(`${path}:${index + 1}: the line does not match its checksum`);
  });
}

/** Returns whether the log begins with a line of build 0.1.0. An empty log does not. */
export function isOldLog(bytes: Buffer): boolean {
  return /^[0-9a-f]{8} /.test(bytes.toString('latin1', 0, 9));
}

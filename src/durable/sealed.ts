/**
 * The text of a record file: JSON whose last key is the seal, the length and the CRC-32 of everything before it.
 *
 *   {
 *     ...
 *     "seal": "1234 89abcdef"
 *   }
 *
 * The seal is compared with the bytes of the file, not with the parsed values, so no byte can change unnoticed, not
 * even a space. The file is still JSON, which people and tools can read.
 */
import { crc32 } from 'node:zlib';
import { MigrationError } from '../domain/errors.js';

const SEAL_KEY = 'seal';
const SEAL = /,\n {2}"seal": "(\d{1,10}) ([0-9a-f]{8})"\n\}\n$/;
const REMEDY = 'stop vmigrated, then: vmctl state check DIR, and vmctl state repair DIR';

/** Values of type bigint become strings of digits. The record must have a key. */
export function seal(record: object): string {
  const { [SEAL_KEY]: _, ...unsealed } = record as Record<string, unknown>;
  const text = JSON.stringify(unsealed, (_key, value: unknown) => (typeof value === 'bigint' ? `${value}` : value), 2);
  const body = text.slice(0, -'\n}'.length);
  return `${body},\n  "${SEAL_KEY}": "${Buffer.byteLength(body)} ${checksum(body)}"\n}\n`;
}

/** Returns the record without its seal. Throws CORRUPT if the seal is missing or does not match. `where` is a path. */
export function unseal(text: string, where: string): unknown {
  const match = SEAL.exec(text);
  if (match === null) throw corrupt(`${where} has no checksum`);
  const body = text.slice(0, match.index);
  if (Buffer.byteLength(body) !== Number(match[1]) || checksum(body) !== match[2])
    throw corrupt(`${where} does not match its checksum`);
  try {
    return JSON.parse(`${body}\n}`);
  } catch (cause) {
    throw corrupt(`${where} is not JSON`, cause);
  }
}

/** Returns whether the text looks like a record of build 0.1.0, which had no seal. */
export function isUnsealed(text: string): boolean {
  if (text.includes(`"${SEAL_KEY}"`)) return false;
  try {
    const json: unknown = JSON.parse(text);
    return typeof json === 'object' && json !== null;
  } catch {
    return false;
  }
}

/** Throws UNSUPPORTED for a record of a version that this build does not know. */
export function checkVersion(json: unknown, newest: number, where: string): void {
  const version = typeof json === 'object' && json !== null && 'version' in json ? json.version : undefined;
  if (typeof version !== 'number' || version <= newest) return;
  throw new MigrationError('UNSUPPORTED', `${where} has version ${version}, this build reads up to ${newest}`, {
    remedy: 'run the version of vmigrated that wrote it, or a newer one',
  });
}

function checksum(text: string): string {
  return crc32(text).toString(16).padStart(8, '0');
}

export function corrupt(message: string, cause?: unknown): MigrationError {
  return new MigrationError('CORRUPT', message, { remedy: REMEDY, ...(cause === undefined ? {} : { cause }) });
}

/**
 * Reads the serial numbers from a certificate revocation list (X.509 CRL, RFC 5280 section 5). In each handshake
 * OpenSSL checks the list's signature and date, and refuses every peer if the list is not the CA's. This reader is for
 * connections that are already open, for which there is no further handshake.
 */
import { MigrationError } from '../domain/errors.js';

const SEQUENCE = 0x30;
const EXTENSIONS = 0xa0;
/** The only ways to write a date that RFC 5280 allows, by tag: UTCTime and GeneralizedTime. */
const DATES = new Map([
  [0x17, /^\d{12}Z$/],
  [0x18, /^\d{14}Z$/],
]);
/**
 * What lies in what, as the tags of the elements in hex: 02 INTEGER, 03 BIT STRING, 17 UTCTime, 18 GeneralizedTime,
 * 30 SEQUENCE, a0 extensions. All of it is looked at, or a damaged length or tag could hide an entry.
 */
const SHAPES = {
  file: /^30$/,
  // content, algorithm, signature
  list: /^303003$/,
  // version?, algorithm, issuer, thisUpdate, nextUpdate?, revokedCertificates?, extensions?
  content: /^(02)?3030(17|18){1,2}(30)?(a0)?$/,
  // of entries, or of extensions
  sequence: /^(30)*$/,
  // serial number, date, extensions?
  entry: /^02(17|18)(30)?$/,
  // identifier, critical?, value
  extension: /^06(01)?04$/,
};
const PEM = /-----BEGIN X509 CRL-----([A-Za-z0-9+/=\s]+)-----END X509 CRL-----/;

interface Element {
  readonly tag: number;
  readonly body: Buffer;
}

function corrupt(what: string): MigrationError {
  return new MigrationError('CORRUPT', `the revocation list is malformed: ${what}`);
}

/** Returns the consecutive DER elements in `bytes`. Each length is checked against the remaining bytes. */
function elements(bytes: Buffer): Element[] {
  const found: Element[] = [];
  let offset = 0;
  while (offset < bytes.length) {
    const tag = bytes[offset];
    const first = bytes[offset + 1];
    if (tag === undefined || first === undefined) throw corrupt('it ends within an element');
    let start = offset + 2;
    let length = first;
    if (first >= 0x80) {
      const lengthBytes = first & 0x7f;
      if (lengthBytes === 0 || lengthBytes > 4 || start + lengthBytes > bytes.length)
        throw corrupt('an impossible length');
      length = bytes.readUIntBE(start, lengthBytes);
      start += lengthBytes;
    }
    if (start + length > bytes.length) throw corrupt('an element is longer than the list');
    found.push({ tag, body: bytes.subarray(start, start + length) });
    offset = start + length;
  }
  return found;
}

/** Writes a serial number as upper-case hex without leading zeros, as node:tls does in `serialNumber`. */
export function normalizeSerial(hex: string): string {
  return hex.toUpperCase().replace(/^0+(?=.)/, '');
}

/** The elements in `bytes`, which are what such a thing is made of. */
function fields(bytes: Buffer, shape: keyof typeof SHAPES): Element[] {
  const found = elements(bytes);
  const tags = found.map(({ tag }) => tag.toString(16).padStart(2, '0')).join('');
  if (!SHAPES[shape].test(tags)) throw corrupt(`its ${shape} holds something else`);
  if (found.some(({ tag, body }) => DATES.get(tag)?.test(body.toString('latin1')) === false))
    throw corrupt('a bad date');
  return found;
}

/** The body of the first of `found`, which its shape has shown to be there. */
function first(found: readonly Element[]): Buffer {
  return found[0]?.body ?? Buffer.alloc(0);
}

export function revokedSerials(pem: string): ReadonlySet<string> {
  const match = PEM.exec(pem);
  if (match?.[1] === undefined) throw corrupt('no "X509 CRL" block');
  const list = first(fields(Buffer.from(match[1], 'base64'), 'file'));
  const content = fields(first(fields(list, 'list')), 'content');
  // The third field is the issuer or the first date: a sequence behind it can only be that of the entries.
  const revoked = content.slice(3).find(({ tag }) => tag === SEQUENCE);
  const extensions = content.find(({ tag }) => tag === EXTENSIONS);
  for (const { body } of extensions === undefined ? [] : fields(first(fields(extensions.body, 'file')), 'sequence'))
    fields(body, 'extension');
  const serials = new Set<string>();
  for (const { body } of revoked === undefined ? [] : fields(revoked.body, 'sequence')) {
    const serial = first(fields(body, 'entry'));
    if (serial.length === 0) throw corrupt('an entry without a serial number');
    serials.add(normalizeSerial(serial.toString('hex')));
  }
  return serials;
}

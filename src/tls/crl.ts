/**
 * Reads the serial numbers from a certificate revocation list (X.509 CRL, RFC 5280 section 5). In each handshake
 * OpenSSL checks the list's signature and date, and refuses every peer if the list is not the CA's. This reader is for
 * connections that are already open, for which there is no further handshake.
 */
import { MigrationError } from '../domain/errors.js';

const SEQUENCE = 0x30;
const INTEGER = 0x02;
const UTC_TIME = 0x17;
const GENERALIZED_TIME = 0x18;
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

export function revokedSerials(pem: string): ReadonlySet<string> {
  const match = PEM.exec(pem);
  if (match?.[1] === undefined) throw corrupt('no "X509 CRL" block');
  const [list] = elements(Buffer.from(match[1], 'base64'));
  const [content] = list?.tag === SEQUENCE ? elements(list.body) : [];
  if (content?.tag !== SEQUENCE) throw corrupt('no list in it');
  // version?, algorithm, issuer, thisUpdate, nextUpdate?, revokedCertificates?, extensions?
  const fields = elements(content.body);
  const lastTime = fields.findLastIndex(({ tag }) => tag === UTC_TIME || tag === GENERALIZED_TIME);
  if (lastTime < 0) throw corrupt('no date');
  const revoked = fields[lastTime + 1];
  const serials = new Set<string>();
  if (revoked?.tag !== SEQUENCE) return serials;
  for (const entry of elements(revoked.body)) {
    const [serial] = entry.tag === SEQUENCE ? elements(entry.body) : [];
    if (serial?.tag !== INTEGER) throw corrupt('an entry without a serial number');
    serials.add(normalizeSerial(serial.body.toString('hex')));
  }
  return serials;
}

/** Revocation lists that no CA has written. None of them may be read as a shorter list than it is. */
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Authority } from '../../../src/tls/authority.js';
import { normalizeSerial, revokedSerials } from '../../../src/tls/crl.js';

const REVOKED = ['one', 'two', 'three'];
const MALFORMED = /malformed/;

let directory: string;
let authority: Authority;
let list: Buffer;
let serials: string[];

const pemOf = (der: Buffer): string => `-----BEGIN X509 CRL-----\n${der.toString('base64')}\n-----END X509 CRL-----\n`;
const derOf = (pem: string): Buffer => Buffer.from(pem.replace(/-----[^-]+-----|\s/g, ''), 'base64');
const present = (): Promise<string> => readFile(join(directory, 'ca/crl.pem'), 'utf8');

/** Returns the serial numbers, or null if the list is refused as malformed. */
function read(der: Buffer): ReadonlySet<string> | null {
  try {
    return revokedSerials(pemOf(der));
  } catch (error) {
    expect(error).toMatchObject({ code: 'CORRUPT' });
    return null;
  }
}

/** Tag, length in the long form, body. */
function element(tag: number, ...bodies: Buffer[]): Buffer {
  const body = Buffer.concat(bodies);
  const head = Buffer.from([tag, 0x84, 0, 0, 0, 0]);
  head.writeUInt32BE(body.length, 2);
  return Buffer.concat([head, body]);
}

const TIME = element(0x17, Buffer.from('260101000000Z'));
const SEQUENCE = element(0x30);
const ENTRY = element(0x30, element(0x02, Buffer.from([0, 0xab])), TIME);
const EXTENSION = element(0x30, element(0x06, Buffer.from([85, 29, 20])), element(0x04, Buffer.from([2, 1, 1])));
const EXTENSIONS = element(0xa0, element(0x30, EXTENSION));
const listOf = (...fields: Buffer[]): Buffer =>
  element(0x30, element(0x30, ...fields), SEQUENCE, element(0x03, Buffer.from([0])));

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-crl-'));
  authority = await Authority.create(join(directory, 'ca'), 'test');
  for (const name of REVOKED) await authority.issue({ role: 'host', name }, [], join(directory, name));
});

afterAll(() => rm(directory, { recursive: true, force: true }));

test('a list without entries is read as empty, and one with entries whole', async () => {
  expect(revokedSerials(await present()).size).toBe(0);
  for (const name of REVOKED) await authority.revoke(name);
  list = derOf(await present());
  serials = authority.issued.map(({ serial }) => normalizeSerial(serial));
  expect([...revokedSerials(await present())].sort()).toEqual([...serials].sort());
});

describe('a damaged list', () => {
  test('with another byte in it is refused, or has as many entries as before', () => {
    let refusedCount = 0;
    for (let offset = 0; offset < list.length; offset++) {
      for (let value = 0; value < 256; value++) {
        const damaged = Buffer.from(list);
        damaged[offset] = value;
        const found = read(damaged);
        if (found === null) refusedCount++;
        else if (found.size !== REVOKED.length) throw new Error(`byte ${offset} as ${value}: ${found.size} entries`);
      }
    }
    expect(refusedCount).toBeGreaterThan(0);
  });

  test('that ends early or goes on is refused', () => {
    for (let length = 0; length < list.length; length++)
      expect(() => revokedSerials(pemOf(list.subarray(0, length))), `${length} bytes`).toThrow(MALFORMED);
    for (const tail of [Buffer.from([0]), SEQUENCE, list])
      expect(() => revokedSerials(pemOf(Buffer.concat([list, tail])))).toThrow(MALFORMED);
  });
});

describe('a list by hand', () => {
  test.each([
    ['with a version and extensions', [element(0x02, Buffer.from([1])), SEQUENCE, SEQUENCE, TIME, TIME], ['AB']],
    ['without a version and a next update', [SEQUENCE, SEQUENCE, TIME], ['AB']],
  ])('%s is read', (_, head, expected) => {
    const entries = element(0x30, ENTRY);
    expect([...(read(listOf(...head, entries)) ?? [])]).toEqual(expected);
    expect([...(read(listOf(...head, entries, EXTENSIONS)) ?? [])]).toEqual(expected);
    expect(read(listOf(...head))).toEqual(new Set());
  });

  test.each([
    ['entries before the date', () => listOf(SEQUENCE, SEQUENCE, element(0x30, ENTRY), TIME)],
    ['entries twice', () => listOf(SEQUENCE, SEQUENCE, TIME, element(0x30), element(0x30, ENTRY))],
    ['entries under another tag', () => listOf(SEQUENCE, SEQUENCE, TIME, element(0x31, ENTRY))],
    ['entries as extensions', () => listOf(SEQUENCE, SEQUENCE, TIME, element(0xa0, element(0x30, ENTRY)))],
    ['a date that swallows the entries', () => listOf(SEQUENCE, SEQUENCE, TIME, element(0x17, TIME, ENTRY))],
    ['three dates', () => listOf(SEQUENCE, SEQUENCE, TIME, TIME, TIME, element(0x30, ENTRY))],
    ['no date', () => listOf(SEQUENCE, SEQUENCE, element(0x30, ENTRY))],
    ['no issuer', () => listOf(SEQUENCE, TIME, element(0x30, ENTRY))],
    ['an entry that is none', () => listOf(SEQUENCE, SEQUENCE, TIME, element(0x30, TIME))],
    ['an entry without a date', () => listOf(SEQUENCE, SEQUENCE, TIME, element(0x30, element(0x30, TIME)))],
    [
      'an entry with two serial numbers',
      () => {
        const serial = element(0x02, Buffer.from([1]));
        return listOf(SEQUENCE, SEQUENCE, TIME, element(0x30, element(0x30, serial, serial, TIME)));
      },
    ],
    [
      'an empty serial number',
      () => listOf(SEQUENCE, SEQUENCE, TIME, element(0x30, element(0x30, element(0x02), TIME))),
    ],
    ['no signature', () => element(0x30, element(0x30, SEQUENCE, SEQUENCE, TIME, element(0x30, ENTRY)), SEQUENCE)],
    ['a length without an end', () => Buffer.from([0x30, 0x80, 0, 0])],
    ['a length beyond all memory', () => Buffer.from([0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0])],
    ['a length of nine bytes', () => Buffer.from([0x30, 0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0])],
  ])('with %s is refused', (_, make) => {
    expect(() => revokedSerials(pemOf(make()))).toThrow(MALFORMED);
  });

  test('nested a hundred thousand times is refused at once', () => {
    // Each level is a length field that reaches to the end. The test shows that a level needs no stack frame.
    const depth = 100_000;
    const bytes = Buffer.alloc(depth * 6);
    for (let level = 0; level < depth; level++) {
      bytes.set([0x30, 0x84], level * 6);
      bytes.writeUInt32BE((depth - level - 1) * 6, level * 6 + 2);
    }
    expect(() => revokedSerials(pemOf(bytes))).toThrow(MALFORMED);
  });

  test.each(['', 'garbage', '-----BEGIN X509 CRL-----\n@@@@\n-----END X509 CRL-----\n'])('%j is refused', (text) => {
    expect(() => revokedSerials(text)).toThrow(MALFORMED);
  });

  test('under the label of a certificate is refused', () => {
    const pem = pemOf(listOf(SEQUENCE, SEQUENCE, TIME)).replaceAll('X509 CRL', 'CERTIFICATE');
    expect(() => revokedSerials(pem)).toThrow(MALFORMED);
  });
});

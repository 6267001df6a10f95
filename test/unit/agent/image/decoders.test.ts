import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  CHUNK_BYTES,
  DESCRIPTION_BYTES_MAX,
  decodeEntry,
  decodeHead,
  ENTRY,
  ENTRY_HEADER_BYTES,
  encodeEntry,
  encodeHead,
  FILE_VERSIONS,
  HEAD_BYTES,
  isIntact,
} from '../../../../src/agent/image/file-format.js';
import { parseSignature } from '../../../../src/agent/image/file-signature.js';
import { decodeTouchOrder, encodeTouchOrder } from '../../../../src/agent/image/touch-order.js';
import { MigrationError } from '../../../../src/domain/errors.js';

/** Returns what `decode` makes of bytes that may be anything; null if it refuses them in the way that users see. */
function decoded<T>(decode: () => T): T | null {
  try {
    return decode();
  } catch (error) {
    expect(error).toBeInstanceOf(MigrationError);
    return null;
  }
}

const bytes = (constraints: fc.IntArrayConstraints): fc.Arbitrary<Buffer> =>
  fc.uint8Array(constraints).map((array) => Buffer.from(array));

const head = fc.record({
  version: fc.constantFrom(...Object.values(FILE_VERSIONS)),
  hasOrder: fc.boolean(),
  isSigned: fc.boolean(),
  descriptionBytes: fc.integer({ min: 1, max: DESCRIPTION_BYTES_MAX }),
});

describe('the head of an image file', () => {
  test('is read as it was written', () => {
    fc.assert(
      fc.property(head, (written) => {
        expect(decodeHead(encodeHead(written))).toEqual(written);
      }),
    );
  });

  test('is refused, or is what would be written for what it says', () => {
    const anything = bytes({ minLength: 0, maxLength: 2 * HEAD_BYTES });
    const nearly = fc.tuple(head, fc.nat(HEAD_BYTES - 1), fc.nat(255)).map(([written, at, byte]) => {
      const changed = encodeHead(written);
      changed[at] = byte;
      return changed;
    });
    fc.assert(
      fc.property(fc.oneof(anything, nearly), (read) => {
        const found = decoded(() => decodeHead(read));
        if (found !== null) expect(encodeHead(found)).toEqual(read.subarray(0, HEAD_BYTES));
      }),
      { numRuns: 2000 },
    );
  });
});

const entry = fc
  .record({
    kind: fc.constantFrom(ENTRY.DESCRIPTION, ENTRY.DEVICE_STATE, ENTRY.MEMORY, ENTRY.DISK, ENTRY.TOUCH_ORDER),
    region: fc.integer({ min: 0, max: 2 ** 32 - 1 }),
    offsetBytes: fc.maxSafeNat(),
    data: bytes({ minLength: 1, maxLength: 64 }),
  })
  .map(({ data, ...header }) => ({ header: { ...header, lengthBytes: data.length }, data }));

describe('an entry of an image file', () => {
  test('is read as it was written', () => {
    fc.assert(
      fc.property(entry, ({ header, data }) => {
        const written = encodeEntry(header, data);
        expect(decodeEntry(written)).toEqual(header);
        expect(isIntact(written, data)).toBe(true);
      }),
    );
  });

  test('never reads a damaged entry as another one', () => {
    fc.assert(
      fc.property(entry, fc.nat(), fc.integer({ min: 1, max: 255 }), ({ header, data }, at, bits) => {
        const whole = Buffer.concat([encodeEntry(header, data), data]);
        const place = at % whole.length;
        whole[place] = (whole[place] ?? 0) ^ bits;
        const [damagedHeader, damagedData] = [
          whole.subarray(0, ENTRY_HEADER_BYTES),
          whole.subarray(ENTRY_HEADER_BYTES),
        ];
        const found = decoded(() => decodeEntry(damagedHeader));
        expect(found !== null && isIntact(damagedHeader, damagedData)).toBe(false);
      }),
      { numRuns: 2000 },
    );
  });

  test('of any bytes has a length that its reader has room for, or is refused', () => {
    fc.assert(
      fc.property(bytes({ minLength: ENTRY_HEADER_BYTES, maxLength: ENTRY_HEADER_BYTES }), fc.nat(8), (read, kind) => {
        read.writeUInt32LE(kind, 0);
        read.writeUInt32LE(0, 20);
        const found = decoded(() => decodeEntry(read));
        if (found === null) return;
        expect(found.lengthBytes).toBeLessThanOrEqual(CHUNK_BYTES);
        expect(Number.isSafeInteger(found.offsetBytes)).toBe(true);
      }),
      { numRuns: 2000 },
    );
  });
});

test('the signature of an image file is one, or is refused', () => {
  const anything = fc.oneof(
    bytes({ maxLength: 64 }),
    fc.json().map((text) => Buffer.from(text)),
  );
  fc.assert(
    fc.property(anything, (read) => {
      const found = decoded(() => parseSignature(read));
      if (found !== null) expect(typeof found.contentDigest).toBe('string');
    }),
    { numRuns: 1000 },
  );
});

describe('an order of touches', () => {
  const memory = { regions: [{ lengthBytes: 40 * 65536 }, { lengthBytes: 100_000 }] } as unknown as Parameters<
    typeof decodeTouchOrder
  >[0];
  const order = fc.uniqueArray(fc.nat(41), { maxLength: 42 }).map((clusters) => Uint32Array.from(clusters));

  test('reads what was written, and nothing else, as an order of touches', () => {
    fc.assert(
      fc.property(order, fc.nat(), fc.nat(255), (written, at, bits) => {
        const whole = encodeTouchOrder(memory, written);
        const place = at % whole.length;
        whole[place] = (whole[place] ?? 0) ^ bits;
        expect(decodeTouchOrder(memory, whole)).toEqual(bits === 0 ? written : null);
      }),
      { numRuns: 2000 },
    );
  });

  test('of any bytes, or of another length, is none', () => {
    fc.assert(
      fc.property(order, bytes({ maxLength: 300 }), fc.nat(), (written, junk, cut) => {
        const whole = encodeTouchOrder(memory, written);
        expect(decodeTouchOrder(memory, junk)).toBeNull();
        expect(decodeTouchOrder(memory, whole.subarray(0, cut % whole.length))).toBeNull();
        expect(decodeTouchOrder(memory, Buffer.concat([whole, Buffer.from([0])]))).toBeNull();
      }),
    );
  });
});

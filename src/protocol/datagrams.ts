/**
 * The datagrams of a multicast: docs/PROTOCOL.md, "Multicast". As in wire.ts, which this file continues, the C++ header
 * is generated from it, integers are little-endian, and zero is never a valid value of an enumeration.
 */
import type { StructDefinition } from './wire.js';

export const DATAGRAM_CONSTANTS = {
  /** First byte of every datagram of a multicast; a new layout gets another one. */
  DATAGRAM_MAGIC: 0xd1,
  DATAGRAM_HEADER_BYTES: 48,
  DATAGRAM_TAG_BYTES: 16,
  /** Offsets and lengths of data are multiples of this: 64 bits tell which parts of a page of 4 KiB are here. */
  DATAGRAM_GRAIN_BYTES: 64,
  MULTICAST_KEY_BYTES: 32,
  /** Member 0 is the sender of the pages, and this one whoever sends probes. */
  MULTICAST_PROBE_MEMBER: 0xffff,
  /** The most pages that one report asks for. */
  MULTICAST_WANTED_MAX: 16,
} as const;

export const DATAGRAM_KIND = { DATA: 1, END: 2, REPORT: 3, PROBE: 4 } as const;

export const DATAGRAM_STRUCTS: readonly StructDefinition[] = [
  {
    name: 'DatagramHeader',
    comment: 'Begins every datagram of a multicast. The tag is the AES-256-GMAC of everything else in the datagram.',
    bytes: DATAGRAM_CONSTANTS.DATAGRAM_HEADER_BYTES,
    fields: [
      ['magic', 'u8'],
      ['kind', 'u8', 'DATAGRAM_KIND'],
      ['region', 'u16', 'of DATA; otherwise zero'],
      ['length', 'u16', 'bytes that follow the header, to the end of the datagram'],
      ['member', 'u16', 'who sends it; 0: the sender of the pages'],
      ['session', 'u64', 'random, of the multicast'],
      ['sequence', 'u64', 'grows with each datagram of a member; with the member it is the nonce of the tag'],
      ['offset', 'u64', 'of DATA: within the region. Of PROBE: size of the largest IP packet that is tried'],
      ['tag', 'bytes16'],
    ],
  },
  {
    name: 'MulticastEnd',
    comment: 'Follows the header of END: what has been sent before.',
    bytes: 16,
    fields: [
      ['datagrams', 'u64', 'of kind DATA'],
      ['pages', 'u64'],
    ],
  },
  {
    name: 'MulticastReport',
    comment: 'Follows the header of REPORT: what a receiver has got so far, and what its clones wait for.',
    bytes: 168,
    fields: [
      ['clock_ns', 'u64', "the receiver's monotonic clock"],
      ['highest_sequence', 'u64', "of the sender's datagrams that have arrived"],
      ['received_datagrams', 'u64', 'each sequence once'],
      ['received_bytes', 'u64', 'of these datagrams, with their headers'],
      ['wanted_count', 'u32'],
      ['reserved', 'u32', 'zero'],
      ['wanted', 'bytes128', 'u64 each: region << 48 | page'],
    ],
  },
];

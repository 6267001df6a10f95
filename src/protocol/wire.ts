/**
 * Definitions of the data plane: the only place for numbers on which two programs must agree. `npm run generate` turns
 * this file into native/wire/wire_generated.hpp; test/tidy fails if they differ. Both sides test golden bytes.
 *
 * Version rule: PROTOCOL_VERSION is one number for the whole data plane. Peers with different numbers refuse each other
 * in the hello, before any key is checked, unless a host was told to accept OLD_HELLO_VERSION. A new layout gets a new
 * number.
 * All integers are little-endian. Zero is never a valid value of an enumeration, except in PAGE_STATE, which says why.
 *
 *   One connection for each channel, so that demand never waits behind bulk:
 *   target                                source
 *     | -- HELLO(session, nonce, proof 0) ----> |  before anything is looked up
 *     | <- HELLO_REPLY(CHALLENGE, nonce) ------ |  the same for every session, known or not
 *     | -- HELLO(session, nonce, proof) ------> |  the proof that the target has the token; it covers all that was said
 *     | <- HELLO_REPLY(OK, proof) ------------- |  the source's proof; the source closes after any other status
 *     | ---- READ(tag, key, offset, length) --> |  key must belong to this session; range must be inside the region
 *     | <-- READ_REPLY(tag, status) + bytes --- |  bytes only with status OK, exactly `length` of them
 *     | ---- WRITE(...) + bytes --------------> |  only for keys exposed writable
 *     | <---------- WRITE_REPLY(tag) ---------- |
 *     | <--------- MESSAGE + bytes -----------> |
 *
 * SECURITY INTEGRITY: a tag of FRAME_TAG_BYTES follows each frame. ENCRYPT: TLS 1.3 begins after HELLO_REPLY(OK).
 */

export {
  IMAGE_COUNTERS,
  type ImageCounter,
  SOURCE_COUNTERS,
  type SourceCounter,
  TARGET_COUNTERS,
  type TargetCounter,
} from './counters.js';

export const PROTOCOL_VERSION = 3;
/** The version whose HELLO has the token in clear (OldHello). */
export const OLD_HELLO_VERSION = 2;

/** Scalars that C++ and TypeScript share. Names end with their unit. */
export const CONSTANTS = {
  /** First word of HELLO and HELLO_REPLY: "VMG1". */
  HELLO_MAGIC: 0x31474d56,
  SESSION_ID_BYTES: 16,
  SESSION_TOKEN_BYTES: 32,
  /** HELLO fits rdma_cm's private data (56 bytes), so that every provider sends the same one. */
  HELLO_BYTES: 56,
  HELLO_REPLY_BYTES: 24,
  /** The part of HELLO_REPLY that all versions have. In OLD_HELLO_VERSION it is all of it. */
  HELLO_REPLY_HEAD_BYTES: 8,
  HELLO_NONCE_BYTES: 16,
  HELLO_PROOF_BYTES: 16,
  FRAME_HEADER_BYTES: 32,
  /** An AES-256-GMAC of the frame, whose nonce is the number of frames before it on this connection. */
  FRAME_TAG_BYTES: 16,
  /** The most that one READ or WRITE moves; a peer that asks for more is disconnected. */
  TRANSFER_BYTES_MAX: 1 << 20,
  /** The longest message. */
  MESSAGE_BYTES_MAX: 4096,
  /** The most reads and writes under way on one endpoint; posting more returns would-block. */
  OUTSTANDING_OPS_MAX: 64,
  /** A peer that has not sent its HELLO within this time is disconnected. */
  HELLO_TIMEOUT_MS: 2000,
  /** The most connections on one listener that may wait for their HELLO at once. */
  HELLO_PENDING_MAX: 64,

  PRESENCE_MAGIC: 0x50474d56,
  PRESENCE_VERSION: 1,
  /** Header of the presence file; the page states follow, one byte for each page. */
  PRESENCE_HEADER_BYTES: 4096,

  DIGESTS_MAGIC: 0x48474d56,
  DIGESTS_VERSION: 1,
  /** Header of the file of digests; they follow, one for each page. */
  DIGESTS_HEADER_BYTES: 4096,
  /** The first bytes of the SHA-256 of a page. */
  DIGEST_BYTES: 16,

  /** A keyed digest (AES-256-GMAC) of a page and its place, by which a move is verified. Zeros: a page of zeros. */
  PAGE_TAG_BYTES: 16,
  /** Two hosts compare memory in chunks of so many bytes, or of one larger page. */
  MEMORY_CHUNK_BYTES: 2 << 20,
  /** The most chunks that one call compares. */
  MEMORY_CHUNKS_MAX: 64,

  /** The unit of the recorded order of first touches: what one fault of a clone maps at most. */
  TOUCH_CLUSTER_BYTES: 65_536,
  /** The most clusters that an order has: it is 256 KiB then, and says where 4 GiB begin. */
  TOUCH_CLUSTERS_MAX: 65_536,

  /** A data map: this header, then one bit for each page. A set bit means that the source's file holds data there. */
  DATA_MAP_MAGIC: 0x44474d56,
  /** Of a map that says which pages the VM has written, with the header of a data map. */
  DIRTY_MAP_MAGIC: 0x59444d56,
  DATA_MAP_HEADER_BYTES: 64,

  PRELOAD_MAGIC: 0x4c474d56,
  PRELOAD_VERSION: 1,
  PRELOAD_DESCRIPTORS_MAX: 16,
  PRELOAD_REGIONS_MAX: 64,
  /** A page of guest RAM may be 4 KiB, 2 MiB or 1 GiB; nothing else. */
  PAGE_BYTES_MIN: 4096,
} as const;

/** Which connection of a session a HELLO opens. */
export const CHANNEL = { DEMAND: 1, BULK: 2 } as const;

export const HELLO_STATUS = { OK: 1, BAD_MAGIC: 2, BAD_VERSION: 3, REFUSED: 4, BUSY: 5, CHALLENGE: 6 } as const;

/** How the frames of a connection are protected. A greater number is stronger. */
export const SECURITY = { NONE: 1, INTEGRITY: 2, ENCRYPT: 3 } as const;

export const FRAME_OP = { READ: 1, READ_REPLY: 2, WRITE: 3, WRITE_REPLY: 4, MESSAGE: 5 } as const;

/**
 * Outcome of a READ or WRITE that the peer reports. ABSENT answers a READ alone, and only of a region that its host is
 * still filling: some of the pages are not there yet.
 */
export const OP_STATUS = { OK: 1, BAD_KEY: 2, OUT_OF_RANGE: 3, NOT_ALLOWED: 4, IO_ERROR: 5, ABSENT: 6 } as const;

/**
 * State of a page on a host that is filling a region. It only moves forward; docs/PAGE_STATES.md says what each state
 * allows. ABSENT is zero, so that all pages are absent in a new sparse presence file.
 */
export const PAGE_STATE = { ABSENT: 0, CLAIMED: 1, PRESENT: 2, ZERO: 3 } as const;

/** Messages from and to the preload. See docs/PROTOCOL.md, "Preload handshake". */
export const PRELOAD_OP = { HELLO: 1, REGION: 2, ACK: 3, TRIM: 4 } as const;
export const PRELOAD_STATUS = { OK: 1, REFUSED: 2 } as const;
/** SYNC: missing, minor and write-protect faults. ASYNC_WP: dirty tracking by PAGEMAP_SCAN. */
export const PRELOAD_DESCRIPTOR = { SYNC: 1, ASYNC_WP: 2 } as const;

/** Errors that native code reports; src/domain/errors.ts maps them to the project's stable codes. */
export const NATIVE_ERROR = {
  INVALID_ARGUMENT: 1,
  SYSTEM: 2,
  NOT_PERMITTED: 3,
  NO_SPACE: 4,
  OUT_OF_MEMORY: 5,
  NOT_FOUND: 6,
  ALREADY_EXISTS: 7,
  UNSUPPORTED: 8,
  DISCONNECTED: 9,
  REFUSED: 10,
  TIMEOUT: 11,
  PROTOCOL: 12,
  REGION_CHANGED: 13,
  PROCESS_GONE: 14,
  CLOSED: 15,
  CORRUPT: 16,
  /** A connection is open, but full-size packets do not pass. */
  PATH_STALLED: 17,
  /** A page is not what its digest says. */
  DAMAGED: 18,
} as const;

/** Points at which tests may park, delay or fail the native code. The order is the numbering. */
export const INJECT_POINT = {
  TARGET_FAULT_READ: 1,
  TARGET_CLAIMED: 2,
  TARGET_BEFORE_POST: 3,
  TARGET_BEFORE_PUBLISH: 4,
  TARGET_PREFETCH_CLAIMED: 5,
  SOURCE_BEFORE_REPLY: 6,
  SOURCE_SCAN: 7,
  /** A part of the parent's memory is about to be write-protected. */
  IMAGE_ARM: 8,
  IMAGE_FAULT_READ: 9,
  /** Pages are claimed because the parent or a clone waits for one of them. */
  IMAGE_CLAIMED: 10,
  IMAGE_SWEEP_CLAIMED: 11,
  /** Pages are copied and present; neither the parent nor a clone has been woken for them yet. */
  IMAGE_PUBLISHED: 12,
  /** The last page has been copied; nothing is unregistered yet. */
  IMAGE_FINISH: 13,
  /** Some of a clone's own pages are about to be copied to their file. */
  SOURCE_KEEP: 14,
  /** Both threads of a capture have been asked to end, and have not been waited for yet. */
  IMAGE_STOP: 15,
  /** Some of a clone's memory is about to be read from its process, where its own pages were a moment ago. */
  SOURCE_READ: 16,
  /** Pages of an image are claimed because another host waits for one of them. */
  IMAGE_READER_CLAIMED: 17,
  /** Another host reads pages of an image that still fills: they have been seen here, and not been read yet. */
  IMAGE_SERVE_SEEN: 18,
  /** Pages of an image are claimed because a near holder has them, and nobody waits for them. */
  IMAGE_NEAR_CLAIMED: 19,
} as const;

type FieldType = 'u8' | 'u16' | 'u32' | 'u64' | `bytes${number}`;
export interface StructDefinition {
  readonly name: string;
  readonly comment: string;
  readonly bytes: number;
  readonly fields: readonly (readonly [name: string, type: FieldType, comment?: string])[];
}

/** Packed little-endian records, fields in this order. The generator and the C++ compiler check `bytes`. */
export const STRUCTS: readonly StructDefinition[] = [
  {
    name: 'Hello',
    comment: 'First bytes of every data connection, from the target; sent again with the proof.',
    bytes: CONSTANTS.HELLO_BYTES,
    fields: [
      ['magic', 'u32'],
      ['version', 'u16'],
      ['channel', 'u8'],
      ['security', 'u8'],
      ['session', 'bytes16'],
      ['nonce', 'bytes16', "the target's"],
      ['proof', 'bytes16', 'zero the first time'],
    ],
  },
  {
    name: 'OldHello',
    comment: 'HELLO of OLD_HELLO_VERSION, which is answered by the head of a HELLO_REPLY.',
    bytes: CONSTANTS.HELLO_BYTES,
    fields: [
      ['magic', 'u32'],
      ['version', 'u16'],
      ['channel', 'u16'],
      ['session', 'bytes16'],
      ['token', 'bytes32'],
    ],
  },
  {
    name: 'HelloReply',
    comment: "The source's answer; it closes the connection after any status but CHALLENGE and OK.",
    bytes: CONSTANTS.HELLO_REPLY_BYTES,
    fields: [
      ['magic', 'u32'],
      ['version', 'u16'],
      ['status', 'u16'],
      ['value', 'bytes16', "CHALLENGE: the source's nonce; OK: its proof; else zero"],
    ],
  },
  {
    name: 'FrameHeader',
    comment: 'Precedes every frame of the stream transports (tcp; shm for what is not memory).',
    bytes: CONSTANTS.FRAME_HEADER_BYTES,
    fields: [
      ['op', 'u8'],
      ['status', 'u8', 'OP_STATUS in replies; zero in requests'],
      ['reserved', 'u16', 'zero; anything else is a protocol error'],
      ['length', 'u32', 'bytes asked for (READ) or following (READ_REPLY, WRITE, MESSAGE)'],
      ['tag', 'u64', "the requester's, returned unchanged"],
      ['key', 'u64'],
      ['offset', 'u64', 'within the exposed region'],
    ],
  },
  {
    name: 'DataMapHeader',
    comment:
      'Head of a data map. `ready` is written last (release); the reader asks again until it is set. In a map of ' +
      'written pages `ready` is the number of the round, and the reader asks when it has been told that number.',
    bytes: CONSTANTS.DATA_MAP_HEADER_BYTES,
    fields: [
      ['magic', 'u32'],
      ['ready', 'u32', '0 while the source scans, 1 when the bits are final'],
      ['page_count', 'u64'],
      ['data_page_count', 'u64'],
      ['reserved', 'bytes40'],
    ],
  },
  {
    name: 'PresenceHeader',
    comment: 'Head of a presence file; one PAGE_STATE byte a page follows at PRESENCE_HEADER_BYTES.',
    bytes: 64,
    fields: [
      ['magic', 'u32'],
      ['version', 'u32'],
      ['page_bytes', 'u64'],
      ['page_count', 'u64'],
      ['reserved', 'bytes40'],
    ],
  },
  {
    name: 'DigestsHeader',
    comment: 'Head of a file of digests; DIGEST_BYTES a page follow at DIGESTS_HEADER_BYTES.',
    bytes: 64,
    fields: [
      ['magic', 'u32'],
      ['version', 'u32'],
      ['page_bytes', 'u64'],
      ['page_count', 'u64'],
      ['known_count', 'u64', 'the digests of so many pages are here, from the first page on'],
      ['reserved', 'bytes32'],
    ],
  },
  {
    name: 'PreloadHello',
    comment: 'From the preload when QEMU starts, with the descriptors attached (SCM_RIGHTS), in the order of `kinds`.',
    bytes: 96,
    fields: [
      ['magic', 'u32'],
      ['version', 'u16'],
      ['op', 'u16'],
      ['pid', 'u32'],
      ['descriptor_count', 'u32'],
      ['kinds', 'bytes16', 'PRELOAD_DESCRIPTOR of each descriptor'],
      ['numbers', 'bytes64', "u32 each: the descriptor's number inside QEMU, for pidfd_getfd after a restart"],
    ],
  },
  {
    name: 'PreloadRegion',
    comment: 'From the preload each time QEMU maps one of the region files; the mapping call waits for the answer.',
    bytes: 56,
    fields: [
      ['magic', 'u32'],
      ['version', 'u16'],
      ['op', 'u16'],
      ['device', 'u64', 'st_dev of the mapped file'],
      ['inode', 'u64', 'st_ino of the mapped file'],
      ['base', 'u64', "address in QEMU's address space"],
      ['length', 'u64'],
      ['file_offset', 'u64'],
      ['map_flags', 'u64'],
    ],
  },
  {
    name: 'PreloadAck',
    comment: "The agent's answer to PreloadHello and PreloadRegion.",
    bytes: 8,
    fields: [
      ['magic', 'u32'],
      ['op', 'u16'],
      ['status', 'u16', 'PRELOAD_STATUS; REFUSED makes the mapping call fail'],
    ],
  },
  {
    name: 'PreloadTrim',
    comment: 'From the agent before QEMU loads a device state, and when the VM runs. Nobody answers it.',
    bytes: 10,
    fields: [
      ['magic', 'u32'],
      ['op', 'u16'],
      ['hold_ms', 'u32', 'how long malloc_trim does nothing; 0: it works again'],
    ],
  },
];

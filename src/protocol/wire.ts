/**
 * The data plane's definitions: the only place where a number that two programs must agree on is written down. `npm run
 * generate` turns this file into native/wire/wire_generated.hpp; test/tidy fails when the two differ, and golden bytes
 * are tested on both sides.
 *
 * Version rule: PROTOCOL_VERSION is one number for the whole data plane. Peers with different numbers refuse each other
 * in the hello, before any key is looked at. A field never changes its meaning; a new layout is a new number.
 *
 * All integers are little-endian. Zero is never a valid value of an enumeration, with one exception that is explained
 * there (PAGE_STATE).
 *
 *   target                                source                 (one connection for each channel; demand never waits
 *   behind bulk)
 *     | ---- HELLO(session, token, channel) --> |  token compared in constant time before anything else is read
 *     | <--------- HELLO_REPLY(status) -------- |  any status but OK: the source closes
 *     | ---- READ(tag, key, offset, length) --> |  key must belong to this session; range must lie inside the region
 *     | <-- READ_REPLY(tag, status) + bytes --- |  bytes only with status OK, exactly `length` of them
 *     | ---- WRITE(...) + bytes --------------> |  only for keys exposed writable
 *     | <---------- WRITE_REPLY(tag) ---------- |
 *     | <--------- MESSAGE + bytes -----------> |
 */

export const PROTOCOL_VERSION = 1;

/** Scalars that C++ and TypeScript share. Names carry their unit last. */
export const CONSTANTS = {
  /** First word of HELLO and HELLO_REPLY: "VMG1". */
  HELLO_MAGIC: 0x31474d56,
  SESSION_ID_BYTES: 16,
  SESSION_TOKEN_BYTES: 32,
  /** HELLO fits rdma_cm's private data (56 bytes), so that every provider sends the same one. */
  HELLO_BYTES: 56,
  HELLO_REPLY_BYTES: 8,
  FRAME_HEADER_BYTES: 32,
  /** One READ or WRITE moves at most this much; a peer that asks for more is disconnected. */
  TRANSFER_BYTES_MAX: 1 << 20,
  /** One small message. */
  MESSAGE_BYTES_MAX: 4096,
  /** Reads and writes under way on one endpoint; posting more returns would-block. */
  OUTSTANDING_OPS_MAX: 64,
  /** A peer that has not sent its HELLO by then is disconnected. */
  HELLO_TIMEOUT_MS: 2000,
  /** Connections that may be waiting for their HELLO at once on one listener. */
  HELLO_PENDING_MAX: 64,

  PRESENCE_MAGIC: 0x50474d56,
  PRESENCE_VERSION: 1,
  /** The presence file's header; the page states follow, a byte each. */
  PRESENCE_HEADER_BYTES: 4096,

  /** A data map: this header, then one bit a page (bit set = the source's file holds data there). */
  DATA_MAP_MAGIC: 0x44474d56,
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

export const HELLO_STATUS = { OK: 1, BAD_MAGIC: 2, BAD_VERSION: 3, REFUSED: 4, BUSY: 5 } as const;

export const FRAME_OP = { READ: 1, READ_REPLY: 2, WRITE: 3, WRITE_REPLY: 4, MESSAGE: 5 } as const;

/** Outcome of one READ or WRITE as the peer reports it. */
export const OP_STATUS = { OK: 1, BAD_KEY: 2, OUT_OF_RANGE: 3, NOT_ALLOWED: 4, IO_ERROR: 5 } as const;

/**
 * A page's state on a host that is filling a region. It only moves forward; docs/PAGE_STATES.md says what is allowed in
 * each. ABSENT is zero so that a new sparse presence file says "nothing is here".
 */
export const PAGE_STATE = { ABSENT: 0, CLAIMED: 1, PRESENT: 2, ZERO: 3 } as const;

/** What the preload says and is answered. See docs/PROTOCOL.md, "Preload handshake". */
export const PRELOAD_OP = { HELLO: 1, REGION: 2, ACK: 3 } as const;
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
} as const;

/** Where tests may park, delay or fail the native code. The order is the numbering. */
export const INJECT_POINT = {
  TARGET_FAULT_READ: 1,
  TARGET_CLAIMED: 2,
  TARGET_BEFORE_POST: 3,
  TARGET_BEFORE_PUBLISH: 4,
  TARGET_PREFETCH_CLAIMED: 5,
  SOURCE_BEFORE_REPLY: 6,
  SOURCE_SCAN: 7,
  /** A piece of the parent is about to be write-protected. */
  IMAGE_ARM: 8,
  IMAGE_FAULT_READ: 9,
  /** Pages claimed because somebody waits for one of them. */
  IMAGE_CLAIMED: 10,
  IMAGE_SWEEP_CLAIMED: 11,
  /** Copied and present; neither the parent nor a clone has been woken for them. */
  IMAGE_PUBLISHED: 12,
  /** The last page is there; nothing is unregistered yet. */
  IMAGE_FINISH: 13,
  /** Some of a clone's own pages are about to be copied to their file. */
  SOURCE_KEEP: 14,
  /** Both threads of a capture have been asked to end; neither is waited for yet. */
  IMAGE_STOP: 15,
  /** Some of a clone's memory is about to be read, from where its own pages were a moment ago. */
  SOURCE_READ: 16,
} as const;

/**
 * Counters of a target session, in the order in which one call fills them. All are unsigned 64-bit and only grow, but
 * for the three percentiles and the gauges that say so.
 */
export const TARGET_COUNTERS = [
  'pageCount',
  /** gauge */
  'pagesPresent',
  'pagesZero',
  'demandBytes',
  'prefetchBytes',
  'faultCount',
  /** Faults on a page that another fetch had already claimed. */
  'faultOnClaimedCount',
  'faultP50Ns',
  'faultP99Ns',
  'faultMaxNs',
  'faultWaitNs',
  /** From start until the last window in which vCPUs waited more than a tenth of it. */
  'degradedNs',
  'reconnectCount',
  /** From start until the last page was present; 0 until then. */
  'completedNs',
  'cpuNs',
] as const;
export type TargetCounter = (typeof TARGET_COUNTERS)[number];

export const SOURCE_COUNTERS = [
  'readCount',
  'readBytes',
  'dataPages',
  'zeroPages',
  'connections',
  'rejectedHellos',
  'cpuNs',
  /** Of a clone: pages that it has written (of 4 KiB), and how many of them are in a file by now. */
  'ownPages',
  'ownPagesKept',
] as const;
export type SourceCounter = (typeof SOURCE_COUNTERS)[number];

/** Counters of an image's capture. Unsigned 64-bit; all but the percentiles only grow. */
export const IMAGE_COUNTERS = [
  'pagesTotal',
  /** Here with their bytes; with `pagesZero` they come to `pagesTotal`. */
  'pagesCopied',
  /** Holes of the parent: known to be zeros, never copied. */
  'pagesZero',
  'copiedBytes',
  /** Writes of the parent that had to wait until their page was copied. */
  'parentFaultCount',
  'parentFaultP50Ns',
  'parentFaultP99Ns',
  'parentFaultMaxNs',
  'parentFaultWaitNs',
  /** From seal until the last window in which the parent waited more than a tenth of it. */
  'parentDegradedNs',
  'cloneFaultCount',
  'cloneFaultP99Ns',
  /** Writes of the parent between arm and seal: noted and let through. */
  'notedFaultCount',
  /** Pages protected again by protect and seal: what the pause depends on. */
  'rearmedPages',
  'armNs',
  'protectNs',
  'sealNs',
  /** From seal until the image was complete; 0 until then. */
  'copyNs',
  'cpuNs',
] as const;
export type ImageCounter = (typeof IMAGE_COUNTERS)[number];

type FieldType = 'u8' | 'u16' | 'u32' | 'u64' | `bytes${number}`;
export interface StructDefinition {
  readonly name: string;
  readonly comment: string;
  readonly bytes: number;
  readonly fields: readonly (readonly [name: string, type: FieldType, comment?: string])[];
}

/**
 * Packed records, little-endian, in the order written. `bytes` is asserted by the generator and by the C++ compiler.
 */
export const STRUCTS: readonly StructDefinition[] = [
  {
    name: 'Hello',
    comment: 'First bytes of every data connection, from the target.',
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
    comment: "The source's answer; it closes the connection after any status but OK.",
    bytes: CONSTANTS.HELLO_REPLY_BYTES,
    fields: [
      ['magic', 'u32'],
      ['version', 'u16'],
      ['status', 'u16'],
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
    comment: 'Head of a data map. `ready` is written last (release); the reader asks again until it is set.',
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
];

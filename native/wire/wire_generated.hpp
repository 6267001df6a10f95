/* Generated from src/protocol/wire.ts by `npm run generate`; do not edit. */
// clang-format off
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace vmigrate::wire {

inline constexpr uint16_t kProtocolVersion = 3;
inline constexpr uint16_t kOldHelloVersion = 2;
inline constexpr uint32_t kHelloMagic = 826756438u;
inline constexpr uint32_t kSessionIdBytes = 16u;
inline constexpr uint32_t kSessionTokenBytes = 32u;
inline constexpr uint32_t kHelloBytes = 56u;
inline constexpr uint32_t kHelloReplyBytes = 24u;
inline constexpr uint32_t kHelloReplyHeadBytes = 8u;
inline constexpr uint32_t kHelloNonceBytes = 16u;
inline constexpr uint32_t kHelloProofBytes = 16u;
inline constexpr uint32_t kFrameHeaderBytes = 32u;
inline constexpr uint32_t kFrameTagBytes = 16u;
inline constexpr uint32_t kTransferBytesMax = 1048576u;
inline constexpr uint32_t kMessageBytesMax = 4096u;
inline constexpr uint32_t kOutstandingOpsMax = 64u;
inline constexpr uint32_t kHelloTimeoutMs = 2000u;
inline constexpr uint32_t kHelloPendingMax = 64u;
inline constexpr uint32_t kPresenceMagic = 1346850134u;
inline constexpr uint32_t kPresenceVersion = 1u;
inline constexpr uint32_t kPresenceHeaderBytes = 4096u;
inline constexpr uint32_t kDigestsMagic = 1212632406u;
inline constexpr uint32_t kDigestsVersion = 1u;
inline constexpr uint32_t kDigestsHeaderBytes = 4096u;
inline constexpr uint32_t kDigestBytes = 16u;
inline constexpr uint32_t kPageTagBytes = 16u;
inline constexpr uint32_t kMemoryChunkBytes = 2097152u;
inline constexpr uint32_t kMemoryChunksMax = 64u;
inline constexpr uint32_t kTouchClusterBytes = 65536u;
inline constexpr uint32_t kTouchClustersMax = 65536u;
inline constexpr uint32_t kDataMapMagic = 1145523542u;
inline constexpr uint32_t kDirtyMapMagic = 1497648470u;
inline constexpr uint32_t kDataMapHeaderBytes = 64u;
inline constexpr uint32_t kPreloadMagic = 1279741270u;
inline constexpr uint32_t kPreloadVersion = 1u;
inline constexpr uint32_t kPreloadDescriptorsMax = 16u;
inline constexpr uint32_t kPreloadRegionsMax = 64u;
inline constexpr uint32_t kPageBytesMin = 4096u;
inline constexpr uint32_t kDatagramMagic = 209u;
inline constexpr uint32_t kDatagramHeaderBytes = 48u;
inline constexpr uint32_t kDatagramTagBytes = 16u;
inline constexpr uint32_t kDatagramGrainBytes = 64u;
inline constexpr uint32_t kMulticastKeyBytes = 32u;
inline constexpr uint32_t kMulticastProbeMember = 65535u;
inline constexpr uint32_t kMulticastWantedMax = 16u;

enum class Channel : uint16_t {
  kDemand = 1,
  kBulk = 2,
};

enum class HelloStatus : uint16_t {
  kOk = 1,
  kBadMagic = 2,
  kBadVersion = 3,
  kRefused = 4,
  kBusy = 5,
  kChallenge = 6,
};

enum class FrameOp : uint8_t {
  kRead = 1,
  kReadReply = 2,
  kWrite = 3,
  kWriteReply = 4,
  kMessage = 5,
};

enum class OpStatus : uint8_t {
  kOk = 1,
  kBadKey = 2,
  kOutOfRange = 3,
  kNotAllowed = 4,
  kIoError = 5,
  kAbsent = 6,
};

enum class DatagramKind : uint8_t {
  kData = 1,
  kEnd = 2,
  kReport = 3,
  kProbe = 4,
};

enum class Security : uint8_t {
  kNone = 1,
  kIntegrity = 2,
  kEncrypt = 3,
};

enum class PageState : uint8_t {
  kAbsent = 0,
  kClaimed = 1,
  kPresent = 2,
  kZero = 3,
};

enum class PreloadOp : uint16_t {
  kHello = 1,
  kRegion = 2,
  kAck = 3,
  kTrim = 4,
};

enum class PreloadStatus : uint16_t {
  kOk = 1,
  kRefused = 2,
};

enum class PreloadDescriptor : uint8_t {
  kSync = 1,
  kAsyncWp = 2,
};

enum class NativeError : uint32_t {
  kInvalidArgument = 1,
  kSystem = 2,
  kNotPermitted = 3,
  kNoSpace = 4,
  kOutOfMemory = 5,
  kNotFound = 6,
  kAlreadyExists = 7,
  kUnsupported = 8,
  kDisconnected = 9,
  kRefused = 10,
  kTimeout = 11,
  kProtocol = 12,
  kRegionChanged = 13,
  kProcessGone = 14,
  kClosed = 15,
  kCorrupt = 16,
  kPathStalled = 17,
  kDamaged = 18,
};

enum class InjectPoint : uint32_t {
  kTargetFaultRead = 1,
  kTargetClaimed = 2,
  kTargetBeforePost = 3,
  kTargetBeforePublish = 4,
  kTargetPrefetchClaimed = 5,
  kSourceBeforeReply = 6,
  kSourceScan = 7,
  kImageArm = 8,
  kImageFaultRead = 9,
  kImageClaimed = 10,
  kImageSweepClaimed = 11,
  kImagePublished = 12,
  kImageFinish = 13,
  kSourceKeep = 14,
  kImageStop = 15,
  kSourceRead = 16,
  kImageReaderClaimed = 17,
  kImageServeSeen = 18,
  kImageNearClaimed = 19,
};

enum class TargetCounter : size_t {
  kPageCount = 0,
  kPagesPresent = 1,
  kPagesZero = 2,
  kDemandBytes = 3,
  kPrefetchBytes = 4,
  kPushBytes = 5,
  kFaultCount = 6,
  kFaultOnClaimedCount = 7,
  kFaultP50Ns = 8,
  kFaultP99Ns = 9,
  kFaultMaxNs = 10,
  kFaultWaitNs = 11,
  kDegradedNs = 12,
  kReconnectCount = 13,
  kCompletedNs = 14,
  kCpuNs = 15,
};
inline constexpr size_t kTargetCounterCount = 16;

enum class SourceCounter : size_t {
  kReadCount = 0,
  kReadBytes = 1,
  kDataPages = 2,
  kZeroPages = 3,
  kConnections = 4,
  kRejectedHellos = 5,
  kCpuNs = 6,
  kOwnPages = 7,
  kOwnPagesKept = 8,
};
inline constexpr size_t kSourceCounterCount = 9;

enum class ImageCounter : size_t {
  kPagesTotal = 0,
  kPagesCopied = 1,
  kPagesZero = 2,
  kCopiedBytes = 3,
  kParentFaultCount = 4,
  kParentFaultP50Ns = 5,
  kParentFaultP99Ns = 6,
  kParentFaultMaxNs = 7,
  kParentFaultWaitNs = 8,
  kParentDegradedNs = 9,
  kCloneFaultCount = 10,
  kCloneFaultP99Ns = 11,
  kNotedFaultCount = 12,
  kRearmedPages = 13,
  kArmNs = 14,
  kProtectNs = 15,
  kSealNs = 16,
  kCopyNs = 17,
  kDemandBytes = 18,
  kPrefetchBytes = 19,
  kNearBytes = 20,
  kAbsentAnswers = 21,
  kMulticastBytes = 22,
  kMulticastLostDatagrams = 23,
  kOrderedBytes = 24,
  kReconnectCount = 25,
  kRefusedPages = 26,
  kCpuNs = 27,
};
inline constexpr size_t kImageCounterCount = 28;

/* First bytes of every data connection, from the target; sent again with the proof. */
struct Hello {
  uint32_t magic;
  uint16_t version;
  uint8_t channel;
  uint8_t security;
  uint8_t session[16];
  uint8_t nonce[16]; /* the target's */
  uint8_t proof[16]; /* zero the first time */
} __attribute__((packed));
static_assert(sizeof(struct Hello) == 56, "wire layout");

/* HELLO of OLD_HELLO_VERSION, which is answered by the head of a HELLO_REPLY. */
struct OldHello {
  uint32_t magic;
  uint16_t version;
  uint16_t channel;
  uint8_t session[16];
  uint8_t token[32];
} __attribute__((packed));
static_assert(sizeof(struct OldHello) == 56, "wire layout");

/* The source's answer; it closes the connection after any status but CHALLENGE and OK. */
struct HelloReply {
  uint32_t magic;
  uint16_t version;
  uint16_t status;
  uint8_t value[16]; /* CHALLENGE: the source's nonce; OK: its proof; else zero */
} __attribute__((packed));
static_assert(sizeof(struct HelloReply) == 24, "wire layout");

/* Precedes every frame of the stream transports (tcp; shm for what is not memory). */
struct FrameHeader {
  uint8_t op;
  uint8_t status; /* OP_STATUS in replies; zero in requests */
  uint16_t reserved; /* zero; anything else is a protocol error */
  uint32_t length; /* bytes asked for (READ) or following (READ_REPLY, WRITE, MESSAGE) */
  uint64_t tag; /* the requester's, returned unchanged */
  uint64_t key;
  uint64_t offset; /* within the exposed region */
} __attribute__((packed));
static_assert(sizeof(struct FrameHeader) == 32, "wire layout");

/* Head of a data map. `ready` is written last (release); the reader asks again until it is set. In a map of written pages `ready` is the number of the round, and the reader asks when it has been told that number. */
struct DataMapHeader {
  uint32_t magic;
  uint32_t ready; /* 0 while the source scans, 1 when the bits are final */
  uint64_t page_count;
  uint64_t data_page_count;
  uint8_t reserved[40];
} __attribute__((packed));
static_assert(sizeof(struct DataMapHeader) == 64, "wire layout");

/* Head of a presence file; one PAGE_STATE byte a page follows at PRESENCE_HEADER_BYTES. */
struct PresenceHeader {
  uint32_t magic;
  uint32_t version;
  uint64_t page_bytes;
  uint64_t page_count;
  uint8_t reserved[40];
} __attribute__((packed));
static_assert(sizeof(struct PresenceHeader) == 64, "wire layout");

/* Head of a file of digests; DIGEST_BYTES a page follow at DIGESTS_HEADER_BYTES. */
struct DigestsHeader {
  uint32_t magic;
  uint32_t version;
  uint64_t page_bytes;
  uint64_t page_count;
  uint64_t known_count; /* the digests of so many pages are here, from the first page on */
  uint8_t reserved[32];
} __attribute__((packed));
static_assert(sizeof(struct DigestsHeader) == 64, "wire layout");

/* From the preload when QEMU starts, with the descriptors attached (SCM_RIGHTS), in the order of `kinds`. */
struct PreloadHello {
  uint32_t magic;
  uint16_t version;
  uint16_t op;
  uint32_t pid;
  uint32_t descriptor_count;
  uint8_t kinds[16]; /* PRELOAD_DESCRIPTOR of each descriptor */
  uint8_t numbers[64]; /* u32 each: the descriptor's number inside QEMU, for pidfd_getfd after a restart */
} __attribute__((packed));
static_assert(sizeof(struct PreloadHello) == 96, "wire layout");

/* From the preload each time QEMU maps one of the region files; the mapping call waits for the answer. */
struct PreloadRegion {
  uint32_t magic;
  uint16_t version;
  uint16_t op;
  uint64_t device; /* st_dev of the mapped file */
  uint64_t inode; /* st_ino of the mapped file */
  uint64_t base; /* address in QEMU's address space */
  uint64_t length;
  uint64_t file_offset;
  uint64_t map_flags;
} __attribute__((packed));
static_assert(sizeof(struct PreloadRegion) == 56, "wire layout");

/* The agent's answer to PreloadHello and PreloadRegion. */
struct PreloadAck {
  uint32_t magic;
  uint16_t op;
  uint16_t status; /* PRELOAD_STATUS; REFUSED makes the mapping call fail */
} __attribute__((packed));
static_assert(sizeof(struct PreloadAck) == 8, "wire layout");

/* From the agent before QEMU loads a device state, and when the VM runs. Nobody answers it. */
struct PreloadTrim {
  uint32_t magic;
  uint16_t op;
  uint32_t hold_ms; /* how long malloc_trim does nothing; 0: it works again */
} __attribute__((packed));
static_assert(sizeof(struct PreloadTrim) == 10, "wire layout");

/* Begins every datagram of a multicast. The tag is the AES-256-GMAC of everything else in the datagram. */
struct DatagramHeader {
  uint8_t magic;
  uint8_t kind; /* DATAGRAM_KIND */
  uint16_t region; /* of DATA; otherwise zero */
  uint16_t length; /* bytes that follow the header, to the end of the datagram */
  uint16_t member; /* who sends it; 0: the sender of the pages */
  uint64_t session; /* random, of the multicast */
  uint64_t sequence; /* grows with each datagram of a member; with the member it is the nonce of the tag */
  uint64_t offset; /* of DATA: within the region. Of PROBE: size of the largest IP packet that is tried */
  uint8_t tag[16];
} __attribute__((packed));
static_assert(sizeof(struct DatagramHeader) == 48, "wire layout");

/* Follows the header of END: what has been sent before. */
struct MulticastEnd {
  uint64_t datagrams; /* of kind DATA */
  uint64_t pages;
} __attribute__((packed));
static_assert(sizeof(struct MulticastEnd) == 16, "wire layout");

/* Follows the header of REPORT: what a receiver has got so far, and what its clones wait for. */
struct MulticastReport {
  uint64_t clock_ns; /* the receiver's monotonic clock */
  uint64_t highest_sequence; /* of the sender's datagrams that have arrived */
  uint64_t received_datagrams; /* each sequence once */
  uint64_t received_bytes; /* of these datagrams, with their headers */
  uint32_t wanted_count;
  uint32_t reserved; /* zero */
  uint8_t wanted[128]; /* u64 each: region << 48 | page */
} __attribute__((packed));
static_assert(sizeof(struct MulticastReport) == 168, "wire layout");

}  // namespace vmigrate::wire

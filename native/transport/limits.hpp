#pragma once

#include <cstddef>
#include <cstdint>

#include "wire/wire_generated.hpp"

namespace vmigrate::transport {

/// Connections that one session serves at once. The newest wins, and the oldest of the same channel is
/// closed: a target that lost its network returns before its old connections are known to be dead. The
/// session of an image has two for each host that reads it: more hosts than 128 would close one another's.
inline constexpr size_t kConnectionsMax = 256;
/// Keys of one session. Each region has two (bytes and data map), and there is room for as many again.
inline constexpr size_t kKeysMax = 4 * wire::kPreloadRegionsMax;
/// Small messages that may wait on one connection in one direction.
inline constexpr size_t kMessagesQueuedMax = 16;
/// One recv() takes at most this much. It is small enough to stay in the second-level cache between the
/// socket and the file.
inline constexpr size_t kStagingBytes = 256 << 10;
/// One pwrite() holds the file's inode lock for at most this much, so that a demand page of the same file
/// never waits for a whole bulk transfer.
inline constexpr size_t kStoreBytesMax = 64 << 10;
/// READs of at least this much are sent from the region's mapping. For smaller ones, finding the pages there
/// costs more than the copy that it saves.
inline constexpr uint32_t kSendMappedBytesMin = 64 << 10;
/// A peer that takes no byte of a reply for this long is disconnected.
inline constexpr int kReplyTimeoutMs = 5000;
/// How long the demand channel's serving thread looks for the next request before it sleeps.
inline constexpr int64_t kSpinNs = 50'000;
/// Bytes that an endpoint moves in one poll() before it returns what it has.
inline constexpr size_t kPollBytesMax = 4 << 20;

static_assert(kStagingBytes >= wire::kFrameHeaderBytes + wire::kMessageBytesMax + wire::kFrameTagBytes +
                                   wire::kPageBytesMin,
              "a whole message, or a page and its header, fits the staging buffer");

}  // namespace vmigrate::transport

#pragma once

#include <cstddef>
#include <cstdint>

#include "wire/wire_generated.hpp"

namespace vmigrate::multicast {

/// The only page size that is sent by multicast: the parts of a page are bits of one word.
inline constexpr uint64_t kPageBytes = wire::kPageBytesMin;
static_assert(kPageBytes / wire::kDatagramGrainBytes == 64);

/// What one call to the kernel sends at most, as one chain of equal segments (UDP_SEGMENT).
inline constexpr size_t kBatchBytesMax = 60 << 10;
inline constexpr size_t kBatchDatagramsMax = 64;
/// Datagrams that the kernel keeps while the receiving thread does something else.
inline constexpr int kReceiveBufferBytes = 32 << 20;
/// Small: a full buffer makes the sender wait, where a full queue of the network device would lose datagrams.
inline constexpr int kSendBufferBytes = 1 << 20;
inline constexpr size_t kUdpHeaderBytes = 8;

/// Pages of which only a part is here. Parts of a page follow one another, so few pages are incomplete at a
/// time unless the network reorders much.
inline constexpr size_t kStagedPagesMax = 64;
/// Datagrams that may overtake one another and are still told from repeated ones.
inline constexpr uint64_t kReorderedMax = 4096;

inline constexpr uint64_t kMs = 1'000'000;
/// While datagrams come a receiver reports this often, and otherwise less often.
inline constexpr uint64_t kReportNs = 20 * kMs;
inline constexpr uint64_t kIdleReportNs = 100 * kMs;
/// After this long without a datagram a receiver calls its multicast silent.
inline constexpr uint64_t kSilentNs = 1000 * kMs;
/// A multicast that is silent may go on within this time, for example if the sender's host was very busy.
inline constexpr uint64_t kForsakenNs = 10'000 * kMs;
/// How long a receiver waits for the first datagram.
inline constexpr uint64_t kWaitingNs = 120'000 * kMs;

/// A sender of which nobody has reported anything for this long ends: there is no receiver (left).
inline constexpr uint64_t kUnheardNs = 2000 * kMs;
/// The end is said this often, so that it arrives where datagrams are lost.
inline constexpr int kEndMarks = 10;
inline constexpr uint64_t kEndMarkNs = 15 * kMs;
/// Time whose bytes a sender that was late may catch up with at once.
inline constexpr uint64_t kCatchUpNs = 4 * kMs;
/// Pages around a wanted one that are sent first.
inline constexpr uint64_t kWantedBytes = 64 << 10;
/// Wanted clusters that a sender remembers; older ones are forgotten.
inline constexpr size_t kWantedClustersMax = 256;
/// Receivers that a sender can tell apart; it does not hear the others.
inline constexpr size_t kMembersMax = 1024;

}  // namespace vmigrate::multicast

#pragma once

#include <cstddef>
#include <cstdint>

#include "fetch/limits.hpp"

namespace vmigrate::pager {

/// Near holders of one image. Each has two connections, with a buffer of kStagingBytes each over tcp.
inline constexpr size_t kNearHoldersMax = 32;
/// Runs that bulk has claimed for one near holder and not yet published. A holder that still fills has many
/// short runs.
inline constexpr size_t kNearFetchesMax = 48;
/// States that bulk reads at once, one byte a page.
inline constexpr uint64_t kNearWindowPages = 4096;
/// Pages behind a fault that bulk looks for at once.
inline constexpr uint64_t kNearFollowBytes = kStreamBytesFirst;
/// Pages of a near holder that may be refused, because they are not what their digests say.
inline constexpr uint64_t kNearRefusedPagesMax = 8;
/// A near holder that has not got anything new is looked at again after this long, then after twice as long,
/// up to the maximum.
inline constexpr uint64_t kNearPauseNsMin = 2'000'000;
inline constexpr uint64_t kNearPauseNsMax = 50'000'000;
/// A look at all pages is followed by a pause of this much for each state that it has read, so that the looks
/// take 40 MB/s of the holder's network at most, however large the image is.
inline constexpr uint64_t kNearPauseNsPerState = 25;

/// Near holders hold the root's sweep back for a second with each so many bytes, not with each page: one that
/// brings less in a second is not worth the wait.
inline constexpr uint64_t kNearWorthBytes = 1 << 20;

// One more operation for a window.
static_assert(kNearFetchesMax < wire::kOutstandingOpsMax && kNearFetchesMax <= kDemandFetchesMax);

}  // namespace vmigrate::pager

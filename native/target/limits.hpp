#pragma once

#include <cstddef>
#include <cstdint>

#include "fetch/limits.hpp"

namespace vmigrate::pager {

// The maximum of every queue of a target session beyond those of its fetch. The assertion below checks the
// relation that keeps the queues from overflowing.

/// Faults that one read takes from one userfaultfd.
inline constexpr size_t kFaultBatchMax = 64;
/// Faults that are read and not yet woken: those whose page demand fetches and those that wait for another
/// thread's fetch.
inline constexpr size_t kWaitingFaultsMax = 256;
/// Published runs whose CONTINUE returned EAGAIN: one for each fetch that may end, and one for each fault of
/// a batch that found its page present.
inline constexpr size_t kRetriesMax = kDemandFetchesMax + kFaultBatchMax;

/// Neighbouring pages mapped together with the one that faulted: zero pages, and pages that were fetched
/// ahead.
inline constexpr uint64_t kZeroBatchBytes = 64 << 10;
/// Pages that were fetched ahead and are mapped at once, between two looks at what has come: some 40 µs.
inline constexpr uint64_t kShownBytes = 512 << 10;

static_assert(kWaitingFaultsMax >= kDemandFetchesMax + kFaultBatchMax);

}  // namespace vmigrate::pager

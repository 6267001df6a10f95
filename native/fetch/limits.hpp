#pragma once

#include <cstddef>
#include <cstdint>

#include "wire/wire_generated.hpp"

namespace vmigrate::pager {

// The maximum of every queue of a fetch, and the sizes that it asks for.

/// Pages that demand has claimed and not yet published. Further faults stay in the kernel.
inline constexpr size_t kDemandFetchesMax = 64;
/// Runs that bulk has claimed and not yet published.
inline constexpr size_t kBulkFetchesMax = 32;
/// Operations passed to a transport in one call.
inline constexpr size_t kPostBatchMax = 16;
inline constexpr size_t kCompletionBatchMax = 32;
/// Recent faults that prefetch may look at; older ones are forgotten.
inline constexpr size_t kRecentFaultsMax = 64;
inline constexpr size_t kStreamsMax = 8;

/// Part of a data map that is read at once.
inline constexpr uint64_t kMapPartBytes = 64 << 10;
/// Size of one prefetch while vCPUs are faulting. It bounds how long a fault waits for a page that prefetch
/// has claimed. Measured on two cores over tcp, 512 MiB guest under random faults, drain and fault p99: 128
/// KiB 0.9 s and 0.3 ms, 256 KiB 0.61 s and 0.7 ms, 512 KiB 0.59 s and 1.2 ms, 1 MiB 0.48 s and 3.5 ms.
inline constexpr uint64_t kChunkBytesBusy = 256 << 10;
inline constexpr uint64_t kInFlightBytesBusy = 4 * kChunkBytesBusy;
inline constexpr uint64_t kInFlightBytesQuiet = 4 << 20;
/// Limits in time for slow links. If a transfer would take longer than these, prefetch asks for less, because
/// a fault on a page that prefetch has claimed waits for everything that was asked before it. In order: one
/// chunk and all outstanding bytes while vCPUs are faulting, and all outstanding bytes while none is.
inline constexpr uint64_t kChunkNsBusy = 1'500'000;
inline constexpr uint64_t kInFlightNsBusy = 4 * kChunkNsBusy;
inline constexpr uint64_t kInFlightNsQuiet = 20'000'000;
/// Lower bound of a chunk; with less the link waits for requests.
inline constexpr uint64_t kChunkBytesMin = 32 << 10;
/// After this long without a fault prefetch may grow its chunks.
inline constexpr uint64_t kQuietNs = 3'000'000;
/// First window that is fetched ahead of a fault. It doubles each time the guest runs on into it.
inline constexpr uint64_t kStreamBytesFirst = 256 << 10;
/// If the source is still scanning, it is asked again after this long.
inline constexpr uint64_t kMapRetryNs = 500'000;
/// A read that the transport did not accept, or a call on a userfaultfd that must be repeated, is tried again
/// after at most this long.
inline constexpr int kRetryMs = 1;

static_assert(kDemandFetchesMax <= wire::kOutstandingOpsMax);
// One more operation for the data map's own read.
static_assert(kBulkFetchesMax < wire::kOutstandingOpsMax);
static_assert(kMapPartBytes <= wire::kTransferBytesMax && kMapPartBytes >= wire::kDataMapHeaderBytes);
static_assert(kChunkBytesBusy <= wire::kTransferBytesMax);

}  // namespace vmigrate::pager

#pragma once

#include <algorithm>
#include <cstdint>

#include "fetch/core.hpp"
#include "fetch/limits.hpp"
#include "fetch/service_rate.hpp"

namespace vmigrate::pager {

/// How much a thread that fetches in bulk asks for at once. A fault on a page that was asked for waits for
/// everything asked before it, so both sizes are small while vCPUs fault, and on a slow link. For use by one
/// thread.
class TransferSize {
 public:
  TransferSize(const FetchCore& core, const ServiceRate& rate) : core_(core), rate_(rate) {}

  /// How many bytes may be outstanding at once just now.
  uint64_t in_flight_bytes_max(uint64_t at_ns) const {
    const uint64_t least_bytes = 4 * kChunkBytesMin;
    return is_busy(at_ns)
               ? std::clamp(rate_.bytes_within(kInFlightNsBusy), least_bytes, kInFlightBytesBusy)
               : std::clamp(rate_.bytes_within(kInFlightNsQuiet), least_bytes, kInFlightBytesQuiet);
  }
  /// How many bytes the next fetch should have.
  uint64_t chunk_bytes(uint64_t at_ns) {
    if (is_busy(at_ns))
      chunk_bytes_ = std::clamp(rate_.bytes_within(kChunkNsBusy), kChunkBytesMin, kChunkBytesBusy);
    // Four chunks fill the limit of outstanding bytes, so that the link is never without a request.
    const uint64_t limit_bytes =
        std::min<uint64_t>(in_flight_bytes_max(at_ns) / 4, core_.options().prefetch_bytes_max);
    return chunk_bytes_ = std::min(chunk_bytes_, limit_bytes);
  }
  /// That fetch has begun: the next one may be larger, while no fault comes.
  void grow() { chunk_bytes_ *= 2; }

 private:
  bool is_busy(uint64_t at_ns) const {
    const uint64_t last_fault_ns = core_.last_fault_ns.load(std::memory_order_relaxed);
    return last_fault_ns != 0 && at_ns < last_fault_ns + kQuietNs;
  }

  const FetchCore& core_;
  const ServiceRate& rate_;
  uint64_t chunk_bytes_ = kChunkBytesBusy;
};

}  // namespace vmigrate::pager

#include "base/fault_stats.hpp"

#include <algorithm>
#include <bit>

namespace vmigrate::pager {
namespace {

// All atomics here are relaxed: the numbers are for people, and no other memory depends on them.
void raise(std::atomic<uint64_t>& maximum, uint64_t value) {
  uint64_t seen = maximum.load(std::memory_order_relaxed);
  while (seen < value && !maximum.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

}  // namespace

size_t FaultStats::bucket_of(uint64_t value) {
  if (value < (1u << kSubBits)) return static_cast<size_t>(value);
  const unsigned shift = static_cast<unsigned>(std::bit_width(value)) - kSubBits - 1;
  return ((static_cast<size_t>(shift) + 1) << kSubBits) +
         static_cast<size_t>((value >> shift) & ((1u << kSubBits) - 1));
}

uint64_t FaultStats::bucket_end(size_t bucket) {
  if (bucket < (1u << kSubBits)) return bucket;
  const unsigned shift = static_cast<unsigned>(bucket >> kSubBits) - 1;
  const uint64_t mantissa = (1u << kSubBits) + (bucket & ((1u << kSubBits) - 1));
  return (mantissa << shift) + ((uint64_t{1} << shift) - 1);
}

void FaultStats::record(uint64_t read_ns, uint64_t woken_ns) {
  const uint64_t wait_ns = woken_ns > read_ns ? woken_ns - read_ns : 0;
  buckets_[bucket_of(wait_ns)].fetch_add(1, std::memory_order_relaxed);
  wait_ns_.fetch_add(wait_ns, std::memory_order_relaxed);
  raise(max_ns_, wait_ns);

  const uint64_t from = read_ns > start_ns_ ? read_ns - start_ns_ : 0;
  const uint64_t to = std::max(from, woken_ns > start_ns_ ? woken_ns - start_ns_ : 0);
  const uint64_t first = from / kWindowNs;
  const uint64_t last = to / kWindowNs;
  if (first == last) {
    add_to_window(first, to - from);
    return;
  }
  add_to_window(first, (first + 1) * kWindowNs - from);
  // The wait covers these windows from end to end, so only the last of them can matter.
  if (last - first > 1) raise_degraded_end(last * kWindowNs);
  add_to_window(last, to - last * kWindowNs);
}

void FaultStats::add_to_window(uint64_t window, uint64_t wait_ns) {
  std::atomic<uint64_t>& slot = windows_[window % kWindowSlots];
  const uint64_t tag = (window + 1) & ((uint64_t{1} << (64 - kWaitBits)) - 1);
  uint64_t seen = slot.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t seen_tag = seen >> kWaitBits;
    if (seen_tag > tag) return;
    const uint64_t before = seen_tag == tag ? seen & ((uint64_t{1} << kWaitBits) - 1) : 0;
    const uint64_t sum = std::min(before + wait_ns, (uint64_t{1} << kWaitBits) - 1);
    if (!slot.compare_exchange_weak(seen, tag << kWaitBits | sum, std::memory_order_relaxed)) continue;
    if (sum > kDegradedWaitNs) raise_degraded_end((window + 1) * kWindowNs);
    return;
  }
}

void FaultStats::raise_degraded_end(uint64_t end_ns) {
  raise(degraded_end_ns_, end_ns);
}

uint64_t FaultStats::percentile_ns(uint64_t per_mille) const {
  std::array<uint64_t, kBucketCount> counts;
  uint64_t total = 0;
  for (size_t i = 0; i < kBucketCount; ++i) {
    counts[i] = buckets_[i].load(std::memory_order_relaxed);
    total += counts[i];
  }
  if (total == 0) return 0;
  const uint64_t rank = std::max<uint64_t>(1, (total * per_mille + 999) / 1000);
  uint64_t below = 0;
  for (size_t i = 0; i < kBucketCount; ++i) {
    below += counts[i];
    // The end of the bucket may exceed the largest measured value.
    if (below >= rank) return std::min(bucket_end(i), max_ns());
  }
  return max_ns();
}

}  // namespace vmigrate::pager

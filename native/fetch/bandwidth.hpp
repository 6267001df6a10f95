#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace vmigrate::pager {

/// The limit for pages that nobody waits for, whichever threads fetch them. Thread-safe.
class Bandwidth {
 public:
  /// 0: no limit.
  explicit Bandwidth(uint64_t bytes_per_s) : bytes_per_s_(bytes_per_s) {}

  /// Earliest time of the next fetch.
  uint64_t due_ns() const { return due_ns_.load(std::memory_order_relaxed); }
  /// A fetch of so many bytes begins: delays the next one until the limit has room for this one.
  void take(uint64_t at_ns, uint64_t bytes) {
    if (bytes_per_s_ == 0) return;
    // A huge page is at most 2^30 bytes and a second 2^30 ns: no overflow.
    const uint64_t takes_ns = bytes * 1'000'000'000u / bytes_per_s_;
    const uint64_t earliest_ns = at_ns > kBurstNs ? at_ns - kBurstNs : 0;
    // Relaxed: only the sum counts.
    uint64_t due_ns = due_ns_.load(std::memory_order_relaxed);
    while (!due_ns_.compare_exchange_weak(due_ns, std::max(due_ns, earliest_ns) + takes_ns,
                                          std::memory_order_relaxed)) {
    }
  }

 private:
  /// A limiter that has been idle may catch up for this much time at once.
  static constexpr uint64_t kBurstNs = 10'000'000;

  const uint64_t bytes_per_s_;
  std::atomic<uint64_t> due_ns_{0};
};

}  // namespace vmigrate::pager

#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace vmigrate::pager {

/// How long vCPUs waited, from reading a fault to waking it. Fixed size. Any thread may record and any thread
/// may read.
class FaultStats {
 public:
  /// A window is degraded if vCPUs waited for more than a tenth of it.
  static constexpr uint64_t kWindowNs = 10'000'000;
  static constexpr uint64_t kDegradedWaitNs = kWindowNs / 10;

  /// Sets the time that all times are measured from. Call it before the first record.
  void start(uint64_t start_ns) { start_ns_ = start_ns; }
  /// Adds one wait from `read_ns` to `woken_ns`.
  void record(uint64_t read_ns, uint64_t woken_ns);

  /// Upper bound, within 1/16, of the wait that `per_mille` of all waits do not exceed. 0 if there were no
  /// waits.
  uint64_t percentile_ns(uint64_t per_mille) const;
  uint64_t max_ns() const { return max_ns_.load(std::memory_order_relaxed); }
  uint64_t wait_ns() const { return wait_ns_.load(std::memory_order_relaxed); }
  /// Time from start to the end of the last degraded window. 0 if there was none.
  uint64_t degraded_ns() const { return degraded_end_ns_.load(std::memory_order_relaxed); }

 private:
  // Log-linear: 16 buckets for each power of two, so that a bucket is at most 1/16 wide.
  static constexpr unsigned kSubBits = 4;
  static constexpr size_t kBucketCount = (64 - kSubBits + 1) << kSubBits;
  static size_t bucket_of(uint64_t value);
  static uint64_t bucket_end(size_t bucket);
  void add_to_window(uint64_t window, uint64_t wait_ns);
  void raise_degraded_end(uint64_t end_ns);

  // One word per window: its number in the high bits, the wait seen in it (saturating) in the low bits. So
  // one compare-and-swap opens a window and adds to it. Slots are reused round robin; a late record of an
  // older window is dropped.
  static constexpr unsigned kWaitBits = 32;
  static constexpr size_t kWindowSlots = 64;

  uint64_t start_ns_ = 0;
  std::array<std::atomic<uint64_t>, kBucketCount> buckets_{};
  std::array<std::atomic<uint64_t>, kWindowSlots> windows_{};
  std::atomic<uint64_t> max_ns_{0};
  std::atomic<uint64_t> wait_ns_{0};
  std::atomic<uint64_t> degraded_end_ns_{0};
};

}  // namespace vmigrate::pager

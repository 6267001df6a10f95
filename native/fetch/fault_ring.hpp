#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "base/page_key.hpp"
#include "fetch/limits.hpp"

namespace vmigrate::pager {

/// Pages that have faulted lately, passed from the demand thread to the bulk thread. They are hints: if the
/// reader is slow, old entries are overwritten and lost.
class FaultRing {
 public:
  /// Demand thread.
  void push(PageKey key) {
    const uint64_t head = head_.load(std::memory_order_relaxed);
    entries_[head % kRecentFaultsMax].store(key, std::memory_order_relaxed);
    // R3 pairs with A3 in pop: entry before head.
    head_.store(head + 1, std::memory_order_release);
  }

  /// Bulk thread. Returns 0 if there is nothing new.
  PageKey pop() {
    // A3 pairs with R3 in push.
    const uint64_t head = head_.load(std::memory_order_acquire);
    if (tail_ == head) return 0;
    if (head - tail_ > kRecentFaultsMax) tail_ = head - kRecentFaultsMax;
    // The entry may be newer than the intended one, but it is still a page that faulted.
    return entries_[tail_++ % kRecentFaultsMax].load(std::memory_order_relaxed);
  }

 private:
  std::array<std::atomic<PageKey>, kRecentFaultsMax> entries_{};
  std::atomic<uint64_t> head_{0};
  uint64_t tail_ = 0;  // used by the bulk thread only
};

}  // namespace vmigrate::pager

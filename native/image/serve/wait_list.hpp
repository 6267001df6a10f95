#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "base/page_key.hpp"
#include "image/serve/core.hpp"
#include "image/serve/limits.hpp"

namespace vmigrate::pager {

/// Faults that were read and wait for a page which another thread has claimed. The thread that serves the
/// clones owns it. A fault that finds no room stays in the kernel.
class WaitList {
 public:
  struct Wait {
    uint32_t waiter;  ///< chosen by the owner of the list
    PageKey key;
    uint64_t read_ns;
  };
  explicit WaitList(ImageCore& core) : core_(core) {}

  bool empty() const { return count_ == 0; }
  /// Room for the faults of one read.
  bool has_room() const { return count_ + kImageFaultBatchMax <= waits_.size(); }
  /// The page was seen claimed by another thread, or absent while it could not be claimed. False: it is here
  /// by now, or that claim has been given up, and the wait was not noted.
  bool add(const Wait& wait, wire::PageState seen) {
    waits_[count_++] = wait;
    core_.wait_count.fetch_add(1, std::memory_order_relaxed);
    // F12 pairs with F11 in ImageCore::wake_waits: the wait counted before, the state looked at after. Either
    // we see the new state, or the thread that has changed it sees the wait.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const wire::PageState now = state_of(wait);
    if (now == seen || !(is_here(now) || seen == wire::PageState::kClaimed)) return true;
    --count_;
    core_.wait_count.fetch_sub(1, std::memory_order_relaxed);
    return false;
  }
  /// Removes and visits each wait whose page is not claimed any more. The others stay counted, so that the
  /// publisher sees them. `visit` may add waits.
  template <typename Visit>
  void serve_ready(Visit visit) {
    std::array<Wait, kImageWaitsMax> ready;
    size_t ready_count = 0, kept_count = 0;
    for (size_t i = 0; i < count_; ++i) {
      const Wait wait = waits_[i];
      if (state_of(wait) == wire::PageState::kClaimed)
        waits_[kept_count++] = wait;
      else
        ready[ready_count++] = wait;
    }
    count_ = kept_count;
    core_.wait_count.fetch_sub(ready_count, std::memory_order_relaxed);
    for (size_t i = 0; i < ready_count; ++i) visit(ready[i]);
  }
  void remove(uint32_t waiter) {
    const auto end = waits_.begin() + static_cast<std::ptrdiff_t>(count_);
    const auto kept =
        std::remove_if(waits_.begin(), end, [&](const Wait& wait) { return wait.waiter == waiter; });
    core_.wait_count.fetch_sub(static_cast<size_t>(end - kept), std::memory_order_relaxed);
    count_ = static_cast<size_t>(kept - waits_.begin());
  }

 private:
  static bool is_here(wire::PageState state) {
    return state == wire::PageState::kPresent || state == wire::PageState::kZero;
  }
  wire::PageState state_of(const Wait& wait) const {
    return core_.region(key_region(wait.key)).presence->state(key_page(wait.key));
  }

  ImageCore& core_;
  std::array<Wait, kImageWaitsMax> waits_;
  size_t count_ = 0;
};

}  // namespace vmigrate::pager

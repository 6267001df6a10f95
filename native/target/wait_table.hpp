#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "base/page_key.hpp"
#include "target/limits.hpp"

namespace vmigrate::pager {

/// Faults that were read and whose vCPU still waits for a page to arrive. No wake depends on this table (the
/// kernel keeps the waiters). It tells the bulk thread which of its pages are wanted, measures waits, and
/// bounds how many faults are taken from the kernel. The demand thread inserts a wait; the thread that
/// publishes the page resolves it.
class WaitTable {
 public:
  /// Demand thread. False: full.
  bool insert(PageKey key, uint64_t read_ns) {
    for (size_t i = 0; i < slots_.size(); ++i) {
      Slot& slot = slots_[i];
      // Relaxed: only this thread changes a slot from free to used, and a slot that was just freed may still
      // look used.
      if (slot.key.load(std::memory_order_relaxed) != 0) continue;
      if (i >= used_.load(std::memory_order_relaxed)) used_.store(i + 1, std::memory_order_relaxed);
      slot.read_ns.store(read_ns, std::memory_order_relaxed);
      count_.fetch_add(1, std::memory_order_relaxed);
      // R2 pairs with A2 in resolve: read_ns (and used_, count_) before key.
      slot.key.store(key, std::memory_order_release);
      return true;
    }
    return false;
  }

  /// Number of waiting faults; other threads may lower it at any time.
  size_t count() const { return count_.load(std::memory_order_relaxed); }

  /// First waiting page in [first, end), 0 if none.
  PageKey find(PageKey first, PageKey end) const {
    if (count() == 0) return 0;
    const size_t used = used_.load(std::memory_order_relaxed);
    for (size_t i = 0; i < used; ++i) {
      const PageKey key = slots_[i].key.load(std::memory_order_relaxed);
      if (key >= first && key < end) return key;
    }
    return 0;
  }

  /// Removes every wait in [first, end) and passes its read time to `visit`. Each wait is removed exactly
  /// once even if other threads try too.
  template <typename Visit>
  size_t resolve(PageKey first, PageKey end, Visit visit) {
    size_t resolved = 0;
    if (count() == 0) return 0;
    const size_t used = used_.load(std::memory_order_relaxed);
    for (size_t i = 0; i < used; ++i) {
      Slot& slot = slots_[i];
      // A2 pairs with R2 in insert.
      PageKey key = slot.key.load(std::memory_order_acquire);
      if (key < first || key >= end) continue;
      const uint64_t read_ns = slot.read_ns.load(std::memory_order_relaxed);
      if (!slot.key.compare_exchange_strong(key, 0, std::memory_order_relaxed)) continue;
      count_.fetch_sub(1, std::memory_order_relaxed);
      visit(read_ns);
      ++resolved;
    }
    return resolved;
  }

 private:
  struct Slot {
    std::atomic<PageKey> key{0};
    std::atomic<uint64_t> read_ns{0};
  };
  std::array<Slot, kWaitingFaultsMax> slots_;
  std::atomic<size_t> count_{0};
  /// Slots from here on were never used. The lowest free slot is always taken, so this is the largest number
  /// of waits at any one time.
  std::atomic<size_t> used_{0};
};

}  // namespace vmigrate::pager

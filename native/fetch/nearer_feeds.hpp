#pragma once

#include <atomic>
#include <cstdint>

#include "base/types.hpp"

namespace vmigrate::pager {

/// After this long without a page a nearer feed counts as silent, and the root's pages are swept. It bounds
/// what a group that nobody feeds, or a relay that has died, can cost.
inline constexpr uint64_t kNearerSilentNs = 1'000'000'000;

/// Feeds that are nearer than the root of an image: a multicast, and hosts that hold a part of the image.
/// While one of them is open and brings pages, bulk leaves the pages that nobody waits for to them. All of it
/// is a hint: a page is claimed before anybody brings it. Thread-safe.
class NearerFeeds {
 public:
  /// A feed may bring pages from now on. It counts as one that has just brought a page.
  void open(uint64_t at_ns) {
    note_page(at_ns);
    open_count_.fetch_add(1, std::memory_order_relaxed);
  }
  /// A feed that was opened brings nothing more. Wake the bulk thread afterwards.
  void close() { open_count_.fetch_sub(1, std::memory_order_relaxed); }
  void note_page(uint64_t at_ns) { last_page_ns_.store(at_ns, std::memory_order_relaxed); }
  /// Until when bulk must leave the pages to the feeds, in ns of now_ns(); 0: it need not.
  uint64_t holds_back_until_ns(uint64_t at_ns) const {
    if (open_count_.load(std::memory_order_relaxed) == 0) return 0;
    const uint64_t until_ns = last_page_ns_.load(std::memory_order_relaxed) + kNearerSilentNs;
    return until_ns > at_ns ? until_ns : 0;
  }

 private:
  std::atomic<uint32_t> open_count_{0};
  std::atomic<uint64_t> last_page_ns_{0};
};

}  // namespace vmigrate::pager

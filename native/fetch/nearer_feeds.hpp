#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace vmigrate::pager {

/// After this long without a page a nearer feed counts as silent, and the root's pages are swept. It bounds
/// what a group that nobody feeds, or a relay that has died, can cost.
inline constexpr uint64_t kNearerSilentNs = 1'000'000'000;

/// Feeds that are nearer than the root of an image: a multicast, and hosts that hold a part of the image.
/// While one of them is open and any has brought a page lately, bulk leaves the pages that nobody waits for
/// to them. Near holders in turn leave them to a multicast. All of it is a hint: a page is claimed before
/// anybody brings it. Thread-safe.
class NearerFeeds {
 public:
  enum class Feed : uint8_t { kMulticast = 0, kNearHolders };

  /// A feed may bring pages from now on. It counts as one that has just brought a page.
  void open(uint64_t at_ns, Feed feed = Feed::kMulticast) {
    note_page(at_ns, feed);
    of(feed).open_count.fetch_add(1, std::memory_order_relaxed);
  }
  /// A feed that was opened brings nothing more. Wake the bulk threads afterwards (FetchCore::wake_bulk).
  void close(Feed feed = Feed::kMulticast) { of(feed).open_count.fetch_sub(1, std::memory_order_relaxed); }
  void note_page(uint64_t at_ns, Feed feed = Feed::kMulticast) {
    of(feed).last_page_ns.store(at_ns, std::memory_order_relaxed);
  }
  /// Until when bulk must leave the pages to the feeds, in ns of now_ns(); 0: it need not.
  uint64_t holds_back_until_ns(uint64_t at_ns) const {
    if (!is_open(Feed::kMulticast) && !is_open(Feed::kNearHolders)) return 0;
    const uint64_t until_ns = std::max(silent_ns(Feed::kMulticast), silent_ns(Feed::kNearHolders));
    return until_ns > at_ns ? until_ns : 0;
  }
  /// The same for near holders, which wait for a multicast only.
  uint64_t multicast_until_ns(uint64_t at_ns) const {
    const uint64_t until_ns = silent_ns(Feed::kMulticast);
    return is_open(Feed::kMulticast) && until_ns > at_ns ? until_ns : 0;
  }

 private:
  struct State {
    std::atomic<uint32_t> open_count{0};
    std::atomic<uint64_t> last_page_ns{0};
  };
  State& of(Feed feed) { return feeds_[static_cast<size_t>(feed)]; }
  const State& of(Feed feed) const { return feeds_[static_cast<size_t>(feed)]; }
  bool is_open(Feed feed) const { return of(feed).open_count.load(std::memory_order_relaxed) != 0; }
  uint64_t silent_ns(Feed feed) const {
    return of(feed).last_page_ns.load(std::memory_order_relaxed) + kNearerSilentNs;
  }

  State feeds_[2];
};

}  // namespace vmigrate::pager

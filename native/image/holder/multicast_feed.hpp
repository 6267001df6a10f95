#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "image/holder/page_gate.hpp"
#include "multicast/receiver.hpp"
#include "transport/memory_access.hpp"

namespace vmigrate::pager {

struct MulticastSnapshot {
  bool has_joined = false;
  multicast::ReceiverState state = multicast::ReceiverState::kWaiting;
  std::optional<Error> failure;
  multicast::ReceiverCounters received;
  uint64_t pages = 0;       ///< that it has brought
  uint64_t page_bytes = 0;  ///< of these pages
};

/// A feed of an image: the pages that the root sends to a group (docs/PAGE_STATES.md, "Feeds"). A page is
/// claimed only when all of its bytes are here, so a datagram that is lost holds nobody up. It ends by
/// itself, and is never the only way to a page. join, close and snapshot are for any thread.
class MulticastFeed final : private multicast::PageSink {
 public:
  /// All arguments must outlive it; `digests` may be nullptr.
  MulticastFeed(ImageCore& core, FetchCore& fetch, const ImageDigests* digests);
  ~MulticastFeed() override { close(); }

  /// Joins the group and takes its pages from now on. Once only (kAlreadyExists). kUnsupported if a region
  /// has pages that are not of 4 KiB. `port`: instead of one of the group's provider, for tests.
  Status join(const multicast::Group& group, uint16_t member,
              std::unique_ptr<multicast::DatagramPort> port = nullptr);
  /// Ends it and waits for its thread. Idempotent.
  void close();
  MulticastSnapshot snapshot() const;

 private:
  // multicast::PageSink
  uint64_t page_count(uint32_t region_index) const override;
  bool wants(uint32_t region_index, PageIndex page) const override;
  void take(uint32_t region_index, PageIndex page, std::span<const std::byte> bytes) override;
  void flush() override;
  size_t wanted(std::span<uint64_t> out) override;
  bool must_end() const override;

  Status open_regions();
  void store(PageRun run, std::span<const std::byte> bytes);
  void store_each(PageRun run, std::span<const std::byte> bytes);
  void give_back(PageRun run);
  void give_up(const Error& error);
  void on_edge();

  ImageCore& core_;
  FetchCore& fetch_;
  PageGate gate_;
  std::vector<transport::MemoryAccess> memories_;
  // --- of the receiver's thread: pages that follow one another, and that nobody has claimed yet
  std::vector<std::byte> kept_bytes_;
  uint32_t kept_region_ = 0;
  PageRun kept_{};
  uint64_t refused_count_ = 0;
  std::atomic<bool> has_given_up_{false};
  std::atomic<uint64_t> pages_{0};

  mutable std::mutex mutex_;  // guards the changes below
  std::optional<Error> failure_;
  bool is_closed_ = false;
  bool is_open_ = false;  ///< counted in FetchCore::nearer
  std::unique_ptr<multicast::MulticastReceiver> receiver_;
};

}  // namespace vmigrate::pager

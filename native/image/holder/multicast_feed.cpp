#include "image/holder/multicast_feed.hpp"

#include <algorithm>
#include <cstring>

#include "base/page_key.hpp"
#include "multicast/datagram/port.hpp"

namespace vmigrate::pager {
namespace {

/// Pages of a multicast that may differ from their digests. Far below what fails a session: a member that
/// forges pages can end the multicast, and not the fork.
constexpr uint64_t kForgedPagesMax = 8;

/// Pages that are stored, checked and published together: as many as the sender sends at once.
constexpr uint64_t kKeptPagesMax = 16;

Error store_error(const transport::AccessResult& stored) {
  if (stored.result == transport::OpResult::kNoSpace)
    return {ErrorCode::kNoSpace, stored.system_errno, "region file system is full"};
  return {ErrorCode::kRegionChanged, stored.system_errno, "region file cannot be written"};
}

}  // namespace

MulticastFeed::MulticastFeed(ImageCore& core, FetchCore& fetch, const ImageDigests* digests)
    : core_(core),
      fetch_(fetch),
      gate_(core, fetch, digests, /*wakes=*/true),
      kept_bytes_(kKeptPagesMax * wire::kPageBytesMin) {}

Status MulticastFeed::open_regions() {
  for (const FilledRegion& region : core_.fill().regions()) {
    if (region.page_bytes() != wire::kPageBytesMin)
      return Error{ErrorCode::kUnsupported, 0, "multicast of pages that are not of 4 KiB"};
    const memory::Region& file = *region.file;
    auto memory = transport::MemoryAccess::describe(
        {.base = file.base(), .fd = file.fd(), .fd_offset_bytes = 0, .length_bytes = file.length_bytes()});
    if (!memory) return memory.error();
    memories_.push_back(memory.value());
  }
  return gate_.open();
}

Status MulticastFeed::join(const multicast::Group& group, uint16_t member,
                           std::unique_ptr<multicast::DatagramPort> port) {
  if (!port) {
    // Without the lock: a fabric may take seconds to let a host into a group, and snapshots wait for nothing.
    auto opened = multicast::open_port(group, multicast::Role::kReceiver);
    if (!opened) return opened.error();
    port = std::move(opened).value();
  }
  const std::lock_guard lock(mutex_);
  if (is_closed_) return Error{ErrorCode::kClosed, 0, "the session has ended"};
  if (receiver_) return Error{ErrorCode::kAlreadyExists, 0, "the image has joined a multicast"};
  memories_.clear();
  if (auto status = open_regions(); !status) return status;
  multicast::ReceiverConfig config;
  config.group = group;
  config.member = member;
  config.sink = this;
  config.on_edge = [this] { on_edge(); };
  config.port = std::move(port);
  // Before the first page can come. A feed that is counted and brings nothing holds nobody back for long.
  fetch_.nearer.open(now_ns());
  is_open_ = true;
  auto receiver = multicast::MulticastReceiver::open(std::move(config));
  if (!receiver) {
    is_open_ = false;
    fetch_.nearer.close();
    fetch_.wake_bulk();
    return receiver.error();
  }
  receiver_ = std::move(receiver).value();
  return ok();
}

void MulticastFeed::close() {
  multicast::MulticastReceiver* receiver;
  {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    receiver = receiver_.get();
  }
  if (receiver != nullptr) receiver->close();
}

MulticastSnapshot MulticastFeed::snapshot() const {
  MulticastSnapshot snapshot;
  snapshot.pages = pages_.load(std::memory_order_relaxed);
  snapshot.page_bytes = snapshot.pages * wire::kPageBytesMin;
  const std::lock_guard lock(mutex_);
  if (!receiver_) return snapshot;
  snapshot.has_joined = true;
  snapshot.state = receiver_->state();
  snapshot.failure = receiver_->failure();
  snapshot.received = receiver_->counters();
  if (failure_) {
    snapshot.state = multicast::ReceiverState::kFailed;
    snapshot.failure = failure_;
  }
  return snapshot;
}

uint64_t MulticastFeed::page_count(uint32_t region_index) const {
  const auto& regions = core_.fill().regions();
  return region_index < regions.size() ? regions[region_index].page_count() : 0;
}

bool MulticastFeed::wants(uint32_t region_index, PageIndex page) const {
  return core_.fill().region(region_index).presence->state(page) == wire::PageState::kAbsent;
}

void MulticastFeed::take(uint32_t region_index, PageIndex page, std::span<const std::byte> bytes) {
  const bool follows = region_index == kept_region_ && raw(page) == raw(kept_.first) + kept_.count;
  if (!follows || kept_.count == kKeptPagesMax) flush();
  if (kept_.count == 0) {
    kept_region_ = region_index;
    kept_.first = page;
  }
  std::memcpy(kept_bytes_.data() + kept_.count++ * wire::kPageBytesMin, bytes.data(), wire::kPageBytesMin);
}

/// Others may have claimed some of the pages by now.
void MulticastFeed::flush() {
  memory::PresenceMap* const presence =
      kept_.count == 0 ? nullptr : core_.fill().region(kept_region_).presence.get();
  for (uint64_t done = 0; done < kept_.count && !has_given_up_.load(std::memory_order_relaxed);) {
    const PageIndex first{raw(kept_.first) + done};
    const uint64_t claimed = presence->claim_run(first, kept_.count - done);
    if (claimed != 0) {
      store({first, claimed},
            std::span(kept_bytes_).subspan(done * wire::kPageBytesMin, claimed * wire::kPageBytesMin));
    }
    done += std::max<uint64_t>(claimed, 1);
  }
  kept_.count = 0;
}

/// Pages that this thread has claimed.
void MulticastFeed::store(PageRun run, std::span<const std::byte> bytes) {
  const uint64_t at_bytes = raw(run.first) * wire::kPageBytesMin;
  const auto stored = memories_[kept_region_].store(at_bytes, bytes);
  if (!stored.ok() && run.count > 1) return store_each(run, bytes);
  if (!stored.ok()) {
    give_back(run);
    return give_up(store_error(stored));
  }
  const uint64_t refused = gate_.publish(kept_region_, run);
  if (refused < run.count) {
    pages_.fetch_add(run.count - refused, std::memory_order_relaxed);
    fetch_.nearer.note_page(now_ns());
  }
  refused_count_ += refused;
  if (refused_count_ > kForgedPagesMax)
    give_up({ErrorCode::kDamaged, 0, "pages of the multicast are not what their digests say"});
}

/// After some of the pages have been written, and not all: bytes that nobody has checked must not stay in a
/// page that is given back. A page alone is written as a whole, or not at all.
void MulticastFeed::store_each(PageRun run, std::span<const std::byte> bytes) {
  for (uint64_t i = 0; i < run.count; ++i) {
    const PageRun page{PageIndex{raw(run.first) + i}, 1};
    if (has_given_up_.load(std::memory_order_relaxed))
      give_back(page);
    else
      store(page, bytes.subspan(i * wire::kPageBytesMin, wire::kPageBytesMin));
  }
}

/// Nothing has been written to these pages. Whoever waits for one looks again, and bulk begins again.
void MulticastFeed::give_back(PageRun run) {
  core_.fill().region(kept_region_).presence->unclaim(run);
  core_.wake_waits();
  fetch_.note_unclaimed();
}

/// The session goes on without it. If the reason is this host's, another lane meets it too.
void MulticastFeed::give_up(const Error& error) {
  const std::lock_guard lock(mutex_);
  if (!failure_) failure_ = error;
  has_given_up_.store(true, std::memory_order_relaxed);
}

size_t MulticastFeed::wanted(std::span<uint64_t> out) {
  size_t count = 0;
  while (count < out.size()) {
    const PageKey key = fetch_.wanted_faults.pop();
    if (key == 0) break;
    out[count++] = uint64_t{key_region(key)} << kPageKeyPageBits | raw(key_page(key));
  }
  return count;
}

bool MulticastFeed::must_end() const {
  return has_given_up_.load(std::memory_order_relaxed) || core_.must_stop() != ImageCore::Stop::kNone ||
         core_.fill().all_done();
}

/// The receiver's thread: its state has changed, or it has ended.
void MulticastFeed::on_edge() {
  bool has_ended = false;
  {
    const std::lock_guard lock(mutex_);
    has_ended = is_open_ && receiver_ && receiver_->has_ended();
    if (has_ended) is_open_ = false;
  }
  if (has_ended) {
    fetch_.nearer.close();
    fetch_.wake_bulk();
  }
  core_.notify();
}

}  // namespace vmigrate::pager

#include "image/holder/multicast_feed.hpp"

#include "base/page_key.hpp"

namespace vmigrate::pager {
namespace {

/// Pages of a multicast that may differ from their digests. Far below what fails a session: a member that
/// forges pages can end the multicast, and not the fork.
constexpr uint32_t kForgedPagesMax = 8;

Error store_error(const transport::AccessResult& stored) {
  if (stored.result == transport::OpResult::kNoSpace)
    return {ErrorCode::kNoSpace, stored.system_errno, "region file system is full"};
  return {ErrorCode::kRegionChanged, stored.system_errno, "region file cannot be written"};
}

}  // namespace

MulticastFeed::MulticastFeed(ImageCore& core, FetchCore& fetch, const ImageDigests* digests)
    : core_(core), fetch_(fetch), gate_(core, fetch, digests, /*wakes=*/true) {}

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
  memory::PresenceMap& presence = *core_.fill().region(region_index).presence;
  if (!presence.claim(page)) return;
  if (const auto stored = memories_[region_index].store(raw(page) * bytes.size(), bytes); !stored.ok()) {
    give_back(region_index, page);
    return give_up(store_error(stored));
  }
  gate_.publish(region_index, PageRun{page, 1});
  if (presence.state(page) == wire::PageState::kPresent) {
    pages_.fetch_add(1, std::memory_order_relaxed);
    fetch_.nearer.note_page(now_ns());
  } else if (++refused_count_ > kForgedPagesMax) {
    give_up({ErrorCode::kDamaged, 0, "pages of the multicast are not what their digests say"});
  }
}

/// Nothing has been written to the page. Whoever waits for it looks again, and bulk begins again.
void MulticastFeed::give_back(uint32_t region_index, PageIndex page) {
  core_.fill().region(region_index).presence->unclaim({page, 1});
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

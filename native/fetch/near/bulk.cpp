#include "fetch/near/bulk.hpp"

#include <poll.h>

#include <algorithm>
#include <array>
#include <random>

#include "fetch/near/spread.hpp"

namespace vmigrate::pager {

using Feed = NearerFeeds::Feed;

NearBulkThread::NearBulkThread(FetchCore& core, NearHolders& holders, NearSink& sink)
    : core_(core), holders_(holders), sink_(sink), size_(core, rate_), salt_(std::random_device()()) {}

void NearBulkThread::run() {
  set_up_thread("vmg-near", -5);
  while (!core_.owner().must_end() && !core_.fill().all_done()) {
    bool worked = take_changes();
    worked |= poll();
    worked |= drop_readers();
    const uint64_t at_ns = now_ns();
    update_feed(at_ns);
    worked |= fetch(at_ns);
    // The last pass may have ended just now, and nothing else may come that wakes this thread.
    worked |= update_feed(at_ns);
    if (!worked) sleep(at_ns);
  }
  readers_.clear();
  update_feed(now_ns());
  core_.counters.near_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  // R22 pairs with A22 in HolderSupply::has_ended: every state and byte of this thread before the end.
  core_.near_ended.store(true, std::memory_order_release);
  core_.wake_demand();
}

bool NearBulkThread::take_changes() {
  const uint64_t unclaimed_count = core_.unclaimed_count();
  const uint32_t maps_known = core_.maps_known();
  if (unclaimed_count != unclaimed_count_ || maps_known != maps_known_) {
    unclaimed_count_ = unclaimed_count;
    maps_known_ = maps_known;
    for (const auto& reader : readers_) reader->look_again();
  }
  const uint64_t epoch = holders_.epoch();
  if (epoch == epoch_) return false;
  epoch_ = epoch;
  for (NearLink& link : holders_.take(Lane::kBulk)) {
    const uint64_t first_page = spread(salt_ ^ spread(link.holder->id));
    readers_.push_back(std::make_unique<NearReader>(core_, std::move(link), first_page));
    ++taken_count_;
  }
  return true;
}

/// Ends the connections to holders that are lost. Claims are given back when nothing writes into their pages
/// any more.
bool NearBulkThread::drop_readers() {
  const uint64_t at_ns = now_ns();
  bool dropped = false;
  for (size_t i = 0; i < readers_.size();) {
    NearReader& reader = *readers_[i];
    if (reader.failure()) {
      // Our own file system is full, whoever has sent the page.
      if (reader.failure()->code == ErrorCode::kNoSpace) core_.owner().fail(*reader.failure());
      holders_.drop(reader.holder(), *reader.failure());
    } else if (reader.silent_ns() <= at_ns) {
      holders_.drop(reader.holder(), {ErrorCode::kTimeout, 0, "no answer to a READ for a second"});
    }
    if (!reader.holder().is_lost()) {
      ++i;
      continue;
    }
    reader.give_up([&](uint32_t region_index, PageRun run) { sink_.give_back(region_index, run); });
    readers_.erase(readers_.begin() + static_cast<std::ptrdiff_t>(i));
    dropped = true;
  }
  level_ = UINT32_MAX;
  for (const auto& reader : readers_) level_ = std::min(level_, reader->holder().level);
  return dropped;
}

/// The feed is open from the first holder on, also while it waits for a multicast, so that the root's sweep
/// does not begin between the two. True: it was opened or closed.
bool NearBulkThread::update_feed(uint64_t at_ns) {
  const bool has_more = std::any_of(readers_.begin(), readers_.end(), [this](const auto& reader) {
    return is_active(*reader) && !reader->is_exhausted();
  });
  const bool changes = has_more != is_open_;
  if (changes) {
    is_open_ = has_more;
    if (has_more) {
      core_.nearer.open(at_ns, Feed::kNearHolders);
    } else {
      core_.nearer.close(Feed::kNearHolders);
      core_.wake_bulk();
    }
  }
  for (; taken_count_ != 0; --taken_count_) core_.nearer.close(Feed::kNearHolders);
  const bool was_held_back = is_held_back_;
  is_held_back_ = core_.nearer.multicast_until_ns(at_ns) != 0;
  // The silence of the multicast is not ours.
  if (is_open_ && was_held_back && !is_held_back_) core_.nearer.note_page(at_ns, Feed::kNearHolders);
  return changes;
}

void NearBulkThread::note_worth(uint64_t bytes) {
  const uint64_t limit = core_.options().bandwidth_bytes_per_s;
  worth_bytes_ += bytes;
  if (worth_bytes_ < (limit == 0 ? kNearWorthBytes : std::min(kNearWorthBytes, limit / 2))) return;
  worth_bytes_ = 0;
  core_.nearer.note_page(now_ns(), Feed::kNearHolders);
}

bool NearBulkThread::may_fetch() const {
  return is_open_ && !is_held_back_ && core_.fetches_all.load(std::memory_order_relaxed);
}

uint64_t NearBulkThread::bytes_in_flight() const {
  uint64_t bytes = 0;
  for (const auto& reader : readers_) bytes += reader->bytes_in_flight();
  return bytes;
}

bool NearBulkThread::poll() {
  bool worked = false;
  for (const auto& reader : readers_) {
    if (reader->failure() || reader->holder().is_lost()) continue;
    const NearReader::Polled polled = reader->poll(now_ns());
    worked |= polled.is_any || reader->failure();
    uint64_t bytes = 0;
    for (size_t i = 0; i < polled.here_count; ++i) bytes += polled.here[i].length_bytes;
    if (bytes == 0) continue;
    core_.counters.near_bytes.fetch_add(bytes, std::memory_order_relaxed);
    rate_.note(bytes, now_ns());
    note_worth(bytes);
    for (size_t i = 0; i < polled.here_count; ++i) {
      const uint64_t refused = sink_.publish(polled.here[i].region_index, polled.here[i].run);
      std::atomic<uint64_t>& all = reader->holder().refused_pages;
      if (refused != 0 && all.fetch_add(refused, std::memory_order_relaxed) + refused >= kNearRefusedPagesMax)
        holders_.drop(reader->holder(), {ErrorCode::kDamaged, 0, "pages are not what their digests say"});
    }
  }
  return worked;
}

/// Faults go to the holder that demand asks for the page, which has its neighbours if any has.
void NearBulkThread::follow_faults() {
  while (const PageKey fault = core_.near_recent_faults.pop()) {
    const auto count = static_cast<uint64_t>(std::count_if(
        readers_.begin(), readers_.end(), [this](const auto& reader) { return is_active(*reader); }));
    if (count == 0) continue;
    uint64_t chosen = spread(fault / kNearSpreadPages) % count;
    for (const auto& reader : readers_)
      if (is_active(*reader) && chosen-- == 0) reader->follow(key_region(fault), key_page(fault));
  }
}

/// Goes round the holders, so that each has its share of what may be outstanding.
bool NearBulkThread::fetch(uint64_t at_ns) {
  // Also of holders that are asked for nothing more: what is claimed must come.
  for (const auto& reader : readers_) (void)reader->post_again();
  if (!may_fetch()) return false;
  follow_faults();
  bool worked = false;
  for (bool is_any = true; is_any;) {
    is_any = false;
    for (const auto& reader : readers_) {
      if (!is_active(*reader) || reader->holder().is_lost() || at_ns < core_.bandwidth.due_ns()) continue;
      const uint64_t before = bytes_in_flight();
      if (before >= size_.in_flight_bytes_max(at_ns)) return worked;
      const NearReader::Step step = reader->step(at_ns, size_.chunk_bytes(at_ns));
      is_any |= step != NearReader::Step::kNothing;
      if (step != NearReader::Step::kClaimed) continue;
      if (before == 0) rate_.begin(at_ns);
      core_.bandwidth.take(at_ns, bytes_in_flight() - before);
      size_.grow();
    }
    worked |= is_any;
  }
  return worked;
}

/// As BulkThread::sleep: `at_ns` is the time at which nothing was due.
void NearBulkThread::sleep(uint64_t at_ns) {
  core_.counters.near_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  uint64_t due_ns = UINT64_MAX;
  std::array<pollfd, 1 + kNearHoldersMax> watched{
      {{.fd = core_.near_wake.fd(), .events = POLLIN, .revents = 0}}};
  nfds_t watched_count = 1;
  for (const auto& reader : readers_) {
    if (reader->failure()) return;
    reader->sleep();
    if (watched_count < watched.size())
      watched[watched_count++] = {.fd = reader->event_fd(), .events = POLLIN, .revents = 0};
    due_ns = std::min(due_ns, reader->silent_ns());
    if (reader->post_again()) due_ns = std::min(due_ns, at_ns + kRetryMs * 1'000'000u);
    if (may_fetch() && is_active(*reader) && reader->due_ns() > at_ns)
      due_ns = std::min(due_ns, reader->due_ns());
  }
  if (is_open_ && is_held_back_) due_ns = std::min(due_ns, core_.nearer.multicast_until_ns(at_ns));
  if (may_fetch() && core_.bandwidth.due_ns() > at_ns) due_ns = std::min(due_ns, core_.bandwidth.due_ns());
  timespec timeout{};
  if (due_ns != UINT64_MAX) {
    const uint64_t wait_ns = due_ns > at_ns ? due_ns - at_ns : 0;
    timeout.tv_sec = static_cast<time_t>(wait_ns / 1'000'000'000u);
    timeout.tv_nsec = static_cast<long>(wait_ns % 1'000'000'000u);
  }
  if (::ppoll(watched.data(), watched_count, due_ns == UINT64_MAX ? nullptr : &timeout, nullptr) < 0 &&
      errno != EINTR) {
    core_.owner().fail(system_error("ppoll"));
  }
  core_.near_wake.drain();
}

}  // namespace vmigrate::pager

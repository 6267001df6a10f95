#include "image/holder/supply.hpp"

#include "base/inject_point.hpp"
#include "fetch/limits.hpp"

namespace vmigrate::pager {

using wire::InjectPoint;

HolderSupply::HolderSupply(ImageCore& core, const FetchOptions& options, const ImageDigests* digests)
    : core_(core),
      fetch_(core.fill(), options, core.serve_wake, *this),
      demand_gate_(core, fetch_, digests, /*wakes=*/false),
      bulk_gate_(core, fetch_, digests, /*wakes=*/true),
      near_gate_(core, fetch_, digests, /*wakes=*/true),
      demand_sink_(demand_gate_),
      bulk_(fetch_, *this),
      near_holders_(fetch_),
      near_demand_sink_(demand_gate_),
      near_bulk_sink_(near_gate_),
      near_bulk_(fetch_, near_holders_, near_bulk_sink_) {
  fetch_.fetches_all.store(false, std::memory_order_relaxed);
}

Status HolderSupply::open(Watcher& watcher) {
  for (PageGate* gate : {&demand_gate_, &bulk_gate_, &near_gate_})
    if (auto status = gate->open(); !status) return status;
  lane_.emplace(fetch_, demand_sink_, watcher, /*tag=*/0, /*spins=*/false);
  near_demand_.emplace(fetch_, near_holders_, near_demand_sink_, *lane_);
  if (auto status = near_demand_->open(); !status) return status;
  if (auto status = watcher.watch(near_demand_->event_fd(), /*tag=*/1); !status) return status;
  return fetch_.check();
}

/// The root's sweep waits for near holders that are here already: they count as if they had just brought a
/// page.
void HolderSupply::fetch_all() {
  if (fetch_.fetches_all.load(std::memory_order_relaxed)) return;
  fetch_.nearer.note_page(now_ns(), NearerFeeds::Feed::kNearHolders);
  fetch_.fetches_all.store(true, std::memory_order_relaxed);
  wake_bulk();
}

std::array<int, 2> HolderSupply::completion_fds() const {
  return {lane_ ? lane_->event_fd() : -1, near_demand_ ? near_demand_->event_fd() : -1};
}

void HolderSupply::on_fault(PageKey key, uint64_t read_ns) {
  fetch_.recent_faults.push(key);
  fetch_.near_recent_faults.push(key);
  fetch_.wanted_faults.push(key);
  fetch_.last_fault_ns.store(read_ns, std::memory_order_relaxed);
}

/// One page, like a target: the faults of several clones on it wait for the one READ.
Supply::Answer HolderSupply::want(uint32_t region_index, PageIndex page) {
  // A claim that no near holder can serve moves to this lane.
  if (lane_->free_count() <= near_demand_->used_count()) return Answer::kLater;
  if (!core_.region(region_index).presence->claim(page)) return Answer::kHere;
  inject_point(InjectPoint::kImageClaimed, page_key(region_index, page));
  if (near_demand_->start(region_index, page)) return Answer::kLater;
  lane_->start(region_index, PageRun{page, 1});
  lane_->post();
  return Answer::kLater;
}

void HolderSupply::step() {
  near_demand_->step();
  lane_->drop_lost_link();
  (void)lane_->take_new_link();
  while (lane_->poll()) {
  }
  if (lane_->has_unposted()) lane_->post();
  lane_->stop_polling();
  // The last page may have come here, and a session may end from here.
  if (must_end() || core_.fill().all_done()) wake_bulk();
}

int HolderSupply::timeout_ms() const {
  return lane_->connected() && lane_->has_unposted() ? kRetryMs : near_demand_->timeout_ms();
}

bool HolderSupply::has_ended() const {
  // A8 pairs with R8 in BulkThread::run: every state and byte of the bulk thread before what is done now.
  // A22 pairs with R22 in NearBulkThread::run: the same of that thread.
  return !is_bulk_begun_ || (fetch_.bulk_ended.load(std::memory_order_acquire) &&
                             fetch_.near_ended.load(std::memory_order_acquire));
}

void HolderSupply::let_go() {
  if (near_demand_) near_demand_->close();
  if (lane_) lane_->close();
  near_holders_.end();
  fetch_.end();
}

void HolderSupply::fail(const Error& error) {
  core_.fail(error);
  near_holders_.end();
  fetch_.end();
  fetch_.wake_lanes();
}

bool HolderSupply::must_end() const {
  return core_.must_stop() != ImageCore::Stop::kNone;
}

}  // namespace vmigrate::pager

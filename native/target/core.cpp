#include "target/core.hpp"

#include "base/check.hpp"
#include "target/limits.hpp"
#include "target/probe.hpp"

namespace vmigrate::pager {

static_assert(kProbeBytes <= kMapPartBytes);

void TargetCore::notice_done(uint64_t done_before, uint64_t added) {
  VMG_CHECK(done_before + added <= page_count_);
  if (done_before + added == page_count_) wake_threads();
}

void TargetCore::add_present(uint64_t page_count) {
  pages_present_.fetch_add(page_count, std::memory_order_relaxed);
  // R6 pairs with A6 in all_done: states and bytes of all pages before the last count.
  notice_done(pages_done_.fetch_add(page_count, std::memory_order_acq_rel), page_count);
}

void TargetCore::add_zero(uint64_t page_count) {
  pages_zero_.fetch_add(page_count, std::memory_order_relaxed);
  // R6, as above.
  notice_done(pages_done_.fetch_add(page_count, std::memory_order_acq_rel), page_count);
}

bool TargetCore::all_done() const {
  // A6 pairs with R6 in add_present and add_zero.
  return pages_done_.load(std::memory_order_acquire) == page_count_;
}

bool TargetCore::must_end() const {
  // A7 pairs with R7 in request_stop; nothing but the flag itself is handed over.
  return stop_.load(std::memory_order_acquire) || state() == TargetState::kFailed;
}

std::optional<Error> TargetCore::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void TargetCore::wake_threads() {
  demand_wake.signal();
  bulk_wake.signal();
}

void TargetCore::fail(const Error& error) {
  {
    const std::lock_guard lock(mutex_);
    if (state() != TargetState::kFilling && state() != TargetState::kDisconnected) return;
    failure_ = error;
    // R4 pairs with A4 in state: the failure before the state that announces it.
    state_.store(TargetState::kFailed, std::memory_order_release);
  }
  wake_threads();
  on_edge_();
}

void TargetCore::report_disconnected(uint64_t epoch) {
  {
    const std::lock_guard lock(mutex_);
    if (state() != TargetState::kFilling || epoch != link_epoch() || all_done()) return;
    state_.store(TargetState::kDisconnected, std::memory_order_release);  // R4
  }
  wake_threads();
  on_edge_();
}

void TargetCore::complete(uint64_t at_ns) {
  {
    const std::lock_guard lock(mutex_);
    if (state() != TargetState::kFilling && state() != TargetState::kDisconnected) return;
    counters.completed_ns.store(at_ns > start_ns ? at_ns - start_ns : 1, std::memory_order_relaxed);
    state_.store(TargetState::kComplete, std::memory_order_release);  // R4
  }
  on_edge_();
}

namespace {

/// A key that cannot hold the region is a peer's mistake. It is refused here, so that operations need no
/// check.
Status check_keys(const std::vector<TargetRegion>& regions, const std::vector<SourceRegionKeys>& keys) {
  if (keys.size() != regions.size()) return Error{ErrorCode::kProtocol, 0, "number of source keys"};
  for (size_t i = 0; i < keys.size(); ++i) {
    const uint64_t page_count = regions[i].region->page_count();
    if (keys[i].ram.length_bytes != regions[i].region->length_bytes()) {
      return Error{ErrorCode::kProtocol, 0, "source region has another length"};
    }
    if (keys[i].data_map.length_bytes < wire::kDataMapHeaderBytes + (page_count + 7) / 8) {
      return Error{ErrorCode::kProtocol, 0, "source data map is too short"};
    }
  }
  return ok();
}

Status register_regions(Link& link, const std::vector<TargetRegion>& regions) {
  for (const TargetRegion& region : regions) {
    auto id =
        link.endpoint->register_local(transport::LocalMemory{.base = region.region->base(),
                                                             .fd = region.region->fd(),
                                                             .fd_offset_bytes = 0,
                                                             .length_bytes = region.region->length_bytes()});
    if (!id) return id.error();
    link.local.push_back(id.value());
  }
  return ok();
}

}  // namespace

Status TargetCore::attach(SourceEndpoints endpoints) {
  if (!endpoints.demand || !endpoints.bulk) {
    return Error{ErrorCode::kInvalidArgument, 0, "connect without endpoints"};
  }
  if (auto status = check_keys(regions_, endpoints.keys); !status) return status;
  const auto probe_timeout = endpoints.probe_timeout;
  Link demand;
  demand.endpoint = std::move(endpoints.demand);
  demand.keys = endpoints.keys;
  Link bulk;
  bulk.endpoint = std::move(endpoints.bulk);
  bulk.keys = std::move(endpoints.keys);
  if (auto status = register_regions(demand, regions_); !status) return status;
  if (auto status = register_regions(bulk, regions_); !status) return status;
  for (Link* link : {&demand, &bulk}) {
    auto buffer = link->endpoint->register_local(
        transport::LocalMemory{.base = map_buffer.data(), .length_bytes = map_buffer.size()});
    if (!buffer) return buffer.error();
    link->map_buffer = buffer.value();
    // The threads do not run yet, so the buffer is free.
    if (probe_timeout.count() == 0 || resume_ || state() != TargetState::kIdle) continue;
    const auto probed =
        probe_path(*link->endpoint, link->map_buffer, link->keys.front().data_map, probe_timeout);
    if (!probed) return probed.error();
  }
  {
    const std::lock_guard lock(mutex_);
    if (state() != TargetState::kIdle && state() != TargetState::kDisconnected) {
      return Error{state() == TargetState::kClosed ? ErrorCode::kClosed : ErrorCode::kInvalidArgument, 0,
                   "connect in this state"};
    }
    const uint64_t epoch = link_epoch_.load(std::memory_order_relaxed) + 1;
    demand.epoch = bulk.epoch = epoch;
    pending_demand_ = std::move(demand);
    pending_bulk_ = std::move(bulk);
    // R5 pairs with A5 in link_epoch.
    link_epoch_.store(epoch, std::memory_order_release);
    if (state() == TargetState::kDisconnected) {
      counters.reconnect_count.fetch_add(1, std::memory_order_relaxed);
      state_.store(TargetState::kFilling, std::memory_order_release);  // R4
    }
  }
  wake_threads();
  return ok();
}

Status TargetCore::begin() {
  const std::lock_guard lock(mutex_);
  if (state() != TargetState::kIdle) {
    return Error{state() == TargetState::kClosed ? ErrorCode::kClosed : ErrorCode::kInvalidArgument, 0,
                 "start in this state"};
  }
  // If every page was here when the session took over, it no longer needs a source.
  if (link_epoch() == 0 && !all_done()) {
    return Error{ErrorCode::kInvalidArgument, 0, "start before connect"};
  }
  start_ns = now_ns();
  stats.start(start_ns);
  state_.store(TargetState::kFilling, std::memory_order_release);  // R4
  return ok();
}

void TargetCore::request_stop() {
  // R7 pairs with A7 in must_end.
  stop_.store(true, std::memory_order_release);
  wake_threads();
}

void TargetCore::finish_close() {
  const std::lock_guard lock(mutex_);
  pending_demand_ = {};
  pending_bulk_ = {};
  if (state() != TargetState::kComplete && state() != TargetState::kFailed) {
    state_.store(TargetState::kClosed, std::memory_order_release);  // R4
  }
}

Link TargetCore::take_link(Lane lane) {
  const std::lock_guard lock(mutex_);
  return std::exchange(lane == Lane::kDemand ? pending_demand_ : pending_bulk_, Link{});
}

std::optional<PageKey> TargetCore::locate(uint32_t descriptor_index, HostAddr address) const {
  for (const MappedRange& range : vm_->ranges) {
    if (range.descriptor_index != descriptor_index || raw(address) < raw(range.base)) continue;
    const uint64_t offset_bytes = raw(address) - raw(range.base);
    if (offset_bytes >= range.length_bytes) continue;
    const uint64_t page_bytes = regions_[range.region_index].region->page_bytes();
    return page_key(range.region_index, PageIndex{(range.region_offset_bytes + offset_bytes) / page_bytes});
  }
  return std::nullopt;
}

}  // namespace vmigrate::pager

#include "fetch/core.hpp"

#include <array>
#include <utility>

#include "fetch/limits.hpp"
#include "fetch/probe.hpp"

namespace vmigrate::pager {
namespace {

/// A key that cannot hold the region is a peer's mistake. It is refused here, so that operations need no
/// check.
Status check_keys(const std::vector<FilledRegion>& regions, const std::vector<SourceRegionKeys>& keys) {
  if (keys.size() != regions.size()) return Error{ErrorCode::kProtocol, 0, "number of source keys"};
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i].ram.length_bytes != regions[i].file->length_bytes()) {
      return Error{ErrorCode::kProtocol, 0, "source region has another length"};
    }
    if (keys[i].data_map.length_bytes < wire::kDataMapHeaderBytes + (regions[i].page_count() + 7) / 8) {
      return Error{ErrorCode::kProtocol, 0, "source data map is too short"};
    }
  }
  return ok();
}

}  // namespace

Status register_regions(Link& link, const FillState& fill) {
  for (const FilledRegion& region : fill.regions()) {
    auto id =
        link.endpoint->register_local(transport::LocalMemory{.base = region.file->base(),
                                                             .fd = region.file->fd(),
                                                             .fd_offset_bytes = 0,
                                                             .length_bytes = region.file->length_bytes()});
    if (!id) return id.error();
    link.local.push_back(id.value());
  }
  return ok();
}

void drop_messages(transport::Endpoint& endpoint) {
  std::array<std::byte, wire::kMessageBytesMax> message;
  while (endpoint.receive(message) != 0) {
  }
}

FetchCore::FetchCore(FillState& fill, const FetchOptions& options, const WakeEvent& demand_wake,
                     FetchOwner& owner)
    : bandwidth(options.bandwidth_bytes_per_s),
      map_buffer(kMapPartBytes),
      fill_(fill),
      options_(options),
      demand_wake_(demand_wake),
      owner_(owner),
      probe_buffer_(kProbeBytes) {
  if (!options_.order.empty()) set_order(std::exchange(options_.order, {}));
}

Status FetchCore::check() const {
  if (options_.prefetch_bytes_max < wire::kPageBytesMin ||
      options_.prefetch_bytes_max > wire::kTransferBytesMax) {
    return Error{ErrorCode::kInvalidArgument, 0, "prefetch_bytes_max"};
  }
  if (!bulk_wake.valid() || !near_wake.valid()) return system_error("eventfd");
  return ok();
}

Status FetchCore::check_may_attach() const {
  if (is_ended_) return Error{ErrorCode::kClosed, 0, "the session has ended"};
  if (is_begun_ && !is_lost_.load(std::memory_order_relaxed)) {
    return Error{ErrorCode::kInvalidArgument, 0, "connect in this state"};
  }
  return ok();
}

Status FetchCore::attach(SourceEndpoints endpoints) {
  if (!endpoints.demand || !endpoints.bulk) {
    return Error{ErrorCode::kInvalidArgument, 0, "connect without endpoints"};
  }
  if (auto status = check_keys(fill_.regions(), endpoints.keys); !status) return status;
  bool is_begun;
  {
    const std::lock_guard lock(mutex_);
    if (auto status = check_may_attach(); !status) return status;
    is_begun = is_begun_;
  }
  const auto probe_timeout = endpoints.probe_timeout;
  Link demand;
  demand.endpoint = std::move(endpoints.demand);
  demand.keys = endpoints.keys;
  Link bulk;
  bulk.endpoint = std::move(endpoints.bulk);
  bulk.keys = std::move(endpoints.keys);
  for (Link* link : {&demand, &bulk}) {
    if (auto status = register_regions(*link, fill_); !status) return status;
    auto buffer = link->endpoint->register_local(
        transport::LocalMemory{.base = map_buffer.data(), .length_bytes = map_buffer.size()});
    if (!buffer) return buffer.error();
    link->map_buffer = buffer.value();
    if (is_begun || probe_timeout.count() == 0) continue;
    auto place = link->endpoint->register_local(
        transport::LocalMemory{.base = probe_buffer_.data(), .length_bytes = probe_buffer_.size()});
    if (!place) return place.error();
    const Status answered =
        probe_path(*link->endpoint, place.value(), link->keys.front().data_map, probe_timeout);
    if (!answered) return answered;
  }
  {
    const std::lock_guard lock(mutex_);
    if (auto status = check_may_attach(); !status) return status;
    const uint64_t epoch = link_epoch_.load(std::memory_order_relaxed) + 1;
    demand.epoch = bulk.epoch = epoch;
    pending_demand_ = std::move(demand);
    pending_bulk_ = std::move(bulk);
    // R5 pairs with A5 in link_epoch.
    link_epoch_.store(epoch, std::memory_order_release);
    if (is_lost_.load(std::memory_order_relaxed)) {
      counters.reconnect_count.fetch_add(1, std::memory_order_relaxed);
      is_lost_.store(false, std::memory_order_relaxed);
    }
  }
  wake_lanes();
  return ok();
}

void FetchCore::begin() {
  const std::lock_guard lock(mutex_);
  is_begun_ = true;
}

void FetchCore::end() {
  {
    const std::lock_guard lock(mutex_);
    is_ended_ = true;
  }
  for (const Lane lane : {Lane::kDemand, Lane::kBulk}) (void)take_link(lane);
}

Link FetchCore::take_link(Lane lane) {
  const std::lock_guard lock(mutex_);
  return std::exchange(lane == Lane::kDemand ? pending_demand_ : pending_bulk_, Link{});
}

void FetchCore::report_lost(uint64_t epoch) {
  {
    const std::lock_guard lock(mutex_);
    if (is_lost_.load(std::memory_order_relaxed) || epoch != link_epoch_.load(std::memory_order_relaxed) ||
        fill_.all_done()) {
      return;
    }
    is_lost_.store(true, std::memory_order_relaxed);
  }
  wake_lanes();
  owner_.on_connection();
}

void FetchCore::set_order(std::vector<uint32_t> order) {
  const std::lock_guard lock(mutex_);
  pending_order_ = std::move(order);
  has_pending_order_.store(true, std::memory_order_relaxed);
}

std::optional<memory::OrderedPages> FetchCore::take_order() {
  if (!has_pending_order_.load(std::memory_order_relaxed)) return std::nullopt;
  const std::lock_guard lock(mutex_);
  has_pending_order_.store(false, std::memory_order_relaxed);
  return memory::OrderedPages(clusters_of(fill_), std::exchange(pending_order_, {}));
}

}  // namespace vmigrate::pager

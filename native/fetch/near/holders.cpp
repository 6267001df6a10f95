#include "fetch/near/holders.hpp"

#include <algorithm>
#include <utility>

namespace vmigrate::pager {
namespace {

Status check_near_keys(const FillState& fill, const std::vector<SourceRegionKeys>& keys) {
  const auto& regions = fill.regions();
  if (keys.size() != regions.size()) return Error{ErrorCode::kProtocol, 0, "number of keys of a near holder"};
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i].ram.length_bytes != regions[i].file->length_bytes())
      return Error{ErrorCode::kProtocol, 0, "region of a near holder has another length"};
    if (keys[i].presence.length_bytes != regions[i].page_count())
      return Error{ErrorCode::kProtocol, 0, "states of a near holder are of another number of pages"};
  }
  return ok();
}

}  // namespace

std::shared_ptr<NearHolder> NearHolders::find(uint32_t id) const {
  const auto found =
      std::find_if(holders_.begin(), holders_.end(), [id](const auto& holder) { return holder->id == id; });
  return found == holders_.end() ? nullptr : *found;
}

Status NearHolders::check_may_add(uint32_t id) const {
  if (is_ended_) return Error{ErrorCode::kClosed, 0, "the session has ended"};
  const auto known = find(id);
  if (known && !known->is_lost()) return Error{ErrorCode::kAlreadyExists, 0, "the near holder is connected"};
  if (!known && holders_.size() == kNearHoldersMax)
    return Error{ErrorCode::kInvalidArgument, 0, "number of near holders"};
  return ok();
}

Status NearHolders::add(SourceEndpoints endpoints, uint32_t id, uint32_t level) {
  if (!endpoints.demand || !endpoints.bulk)
    return Error{ErrorCode::kInvalidArgument, 0, "a near holder without endpoints"};
  const FillState& fill = core_.fill();
  if (auto status = check_near_keys(fill, endpoints.keys); !status) return status;
  if (fill.all_done()) return ok();
  {
    const std::lock_guard lock(mutex_);
    if (auto status = check_may_add(id); !status) return status;
  }
  const auto holder = std::make_shared<NearHolder>(id, level);
  NearLink demand{holder, std::vector<std::byte>(kDemandFetchesMax), {}};
  demand.link.endpoint = std::move(endpoints.demand);
  demand.link.keys = endpoints.keys;
  NearLink bulk{holder, std::vector<std::byte>(kNearWindowPages), {}};
  bulk.link.endpoint = std::move(endpoints.bulk);
  bulk.link.keys = std::move(endpoints.keys);
  for (NearLink* each : {&demand, &bulk}) {
    if (auto status = register_regions(each->link, fill); !status) return status;
    auto buffer = each->link.endpoint->register_local(
        transport::LocalMemory{.base = each->states.data(), .length_bytes = each->states.size()});
    if (!buffer) return buffer.error();
    each->link.map_buffer = buffer.value();
  }
  {
    const std::lock_guard lock(mutex_);
    if (fill.all_done()) return ok();
    if (auto status = check_may_add(id); !status) return status;
    // Before any sweep sees the holder missing; the thread of near bulk closes it when it has taken the link.
    core_.nearer.open(now_ns(), NearerFeeds::Feed::kNearHolders);
    std::erase_if(holders_, [id](const auto& known) { return known->id == id; });
    holders_.push_back(holder);
    pending_demand_.push_back(std::move(demand));
    pending_bulk_.push_back(std::move(bulk));
  }
  changed();
  return ok();
}

void NearHolders::changed() {
  // R23 pairs with A23 in epoch.
  epoch_.fetch_add(1, std::memory_order_release);
  core_.wake_lanes();
}

void NearHolders::remove(uint32_t id) {
  {
    const std::lock_guard lock(mutex_);
    const auto known = find(id);
    if (!known) return;
    known->is_lost_.store(true, std::memory_order_relaxed);
    std::erase(holders_, known);
  }
  changed();
}

void NearHolders::drop(NearHolder& holder, const Error& error) {
  {
    const std::lock_guard lock(mutex_);
    if (holder.is_lost()) return;
    holder.failure_ = error;
    holder.is_lost_.store(true, std::memory_order_relaxed);
  }
  changed();
  core_.owner().on_connection();
}

std::vector<NearSnapshot> NearHolders::snapshot() const {
  const std::lock_guard lock(mutex_);
  std::vector<NearSnapshot> all;
  for (const auto& holder : holders_) {
    all.push_back({holder->id, holder->level, !holder->is_lost() && !is_ended_ && !core_.fill().all_done(),
                   holder->bytes.load(std::memory_order_relaxed), holder->failure_});
  }
  return all;
}

void NearHolders::end() {
  {
    const std::lock_guard lock(mutex_);
    is_ended_ = true;
  }
  for (const Lane lane : {Lane::kDemand, Lane::kBulk}) (void)take(lane);
}

std::vector<NearLink> NearHolders::take(Lane lane) {
  const std::lock_guard lock(mutex_);
  return std::exchange(lane == Lane::kDemand ? pending_demand_ : pending_bulk_, {});
}

}  // namespace vmigrate::pager

#include "fetch/near/demand.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <array>

#include "base/page_key.hpp"
#include "fetch/near/spread.hpp"

namespace vmigrate::pager {
namespace {

constexpr uint64_t kNsPerMs = 1'000'000;

}  // namespace

Status NearDemand::open() {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  return epoll_.valid() ? ok() : Status(system_error("epoll_create1"));
}

size_t NearDemand::used_count() const {
  size_t count = 0;
  for (const auto& lane : lanes_) count += lane->used_count();
  return count;
}

bool NearDemand::start(uint32_t region_index, PageIndex page) {
  take_changes();
  // Otherwise the page may become zero, and what a near holder has written into it would be seen.
  if (lanes_.empty() || region_index >= core_.maps_known()) return false;
  NearDemandLane* lane = choose(region_index, page, 0);
  if (lane == nullptr) return false;
  lane->start(region_index, page, now_ns());
  lane->post();
  return true;
}

/// Of the nearest level from `level_min` on that has a connected holder, the one that the page's place
/// chooses.
NearDemandLane* NearDemand::choose(uint32_t region_index, PageIndex page, uint32_t level_min) const {
  const auto can_ask = [](const NearDemandLane& lane) { return !lane.failure() && !lane.holder().is_lost(); };
  size_t first = 0;
  while (first < lanes_.size() && (lanes_[first]->holder().level < level_min || !can_ask(*lanes_[first])))
    ++first;
  if (first == lanes_.size()) return nullptr;
  const uint32_t level = lanes_[first]->holder().level;
  std::array<NearDemandLane*, kNearHoldersMax> able;
  size_t count = 0;
  for (size_t i = first; i < lanes_.size() && lanes_[i]->holder().level == level && count < able.size(); ++i)
    if (can_ask(*lanes_[i])) able[count++] = lanes_[i].get();
  return able[spread(page_key(region_index, page) / kNearSpreadPages) % count];
}

void NearDemand::move(uint32_t region_index, PageIndex page, uint32_t level_min) {
  if (NearDemandLane* lane = choose(region_index, page, level_min)) {
    lane->start(region_index, page, now_ns());
    lane->post();
    return;
  }
  root_.start(region_index, PageRun{page, 1});
  root_.post();
}

void NearDemand::take_changes() {
  const uint64_t epoch = holders_.epoch();
  if (epoch == epoch_) return;
  epoch_ = epoch;
  for (NearLink& link : holders_.take(Lane::kDemand)) {
    auto lane = std::make_unique<NearDemandLane>(core_, std::move(link), next_number_++);
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = lane->number();
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, lane->event_fd(), &event) != 0) {
      holders_.drop(lane->holder(), system_error("epoll_ctl"));
      continue;
    }
    const auto nearer = [](const auto& one, const auto& other) {
      return one->holder().level < other->holder().level;
    };
    lanes_.insert(std::upper_bound(lanes_.begin(), lanes_.end(), lane, nearer), std::move(lane));
  }
}

/// Claims move on only when the connection that could write into their pages has ended.
void NearDemand::drop_lanes() {
  for (size_t i = 0; i < lanes_.size();) {
    NearDemandLane& lane = *lanes_[i];
    if (lane.failure()) {
      // Our own file system is full, whoever has sent the page.
      if (lane.failure()->code == ErrorCode::kNoSpace) core_.owner().fail(*lane.failure());
      holders_.drop(lane.holder(), *lane.failure());
    }
    if (!lane.holder().is_lost()) {
      ++i;
      continue;
    }
    const auto dropped = std::move(lanes_[i]);
    lanes_.erase(lanes_.begin() + static_cast<std::ptrdiff_t>(i));
    const uint32_t level = dropped->holder().level;
    dropped->give_up([&](uint32_t region_index, PageIndex page) { move(region_index, page, level + 1); });
    i = 0;  // a lane that has just been asked may have been lost thereby
  }
}

/// True if anything has arrived.
bool NearDemand::poll(NearDemandLane& lane) {
  const NearDemandLane::Polled polled = lane.poll(now_ns());
  for (size_t i = 0; i < polled.here_count; ++i) {
    const auto [region_index, page] = polled.here[i];
    NearHolder& holder = lane.holder();
    const uint64_t refused = sink_.publish(region_index, PageRun{page, 1});
    if (refused != 0 &&
        holder.refused_pages.fetch_add(refused, std::memory_order_relaxed) + refused >= kNearRefusedPagesMax)
      holders_.drop(holder, {ErrorCode::kDamaged, 0, "pages are not what their digests say"});
  }
  core_.counters.absent_answers.fetch_add(polled.absent_count, std::memory_order_relaxed);
  for (size_t i = 0; i < polled.absent_count; ++i)
    move(polled.absent[i].region_index, polled.absent[i].page, lane.holder().level + 1);
  lane.post();
  return polled.is_any;
}

void NearDemand::step() {
  take_changes();
  if (lanes_.empty()) return;
  std::array<epoll_event, kNearHoldersMax> events;
  for (bool is_any = true; is_any;) {
    is_any = false;
    const int count = ::epoll_wait(epoll_.get(), events.data(), events.size(), 0);
    for (int i = 0; i < count; ++i) {
      const uint64_t number = events[static_cast<size_t>(i)].data.u64;
      const auto found = std::find_if(lanes_.begin(), lanes_.end(),
                                      [&](const auto& lane) { return lane->number() == number; });
      if (found != lanes_.end() && !(*found)->failure()) is_any |= poll(**found);
    }
    // What was posted last may have been lost.
    drop_lanes();
  }
  const uint64_t at_ns = now_ns();
  for (const auto& lane : lanes_) {
    lane->post();
    if (lane->silent_ns() <= at_ns)
      holders_.drop(lane->holder(), {ErrorCode::kTimeout, 0, "no answer to a READ for a second"});
  }
  drop_lanes();
}

int NearDemand::timeout_ms() const {
  int timeout_ms = -1;
  const uint64_t at_ns = now_ns();
  for (const auto& lane : lanes_) {
    if (lane->failure()) return 0;
    const uint64_t silent_ns = lane->silent_ns();
    int lane_ms = -1;
    if (lane->has_unposted())
      lane_ms = kRetryMs;
    else if (silent_ns != UINT64_MAX)
      lane_ms = silent_ns <= at_ns ? 0 : static_cast<int>((silent_ns - at_ns) / kNsPerMs + 1);
    if (lane_ms >= 0 && (timeout_ms < 0 || lane_ms < timeout_ms)) timeout_ms = lane_ms;
  }
  return timeout_ms;
}

}  // namespace vmigrate::pager

#include "fetch/near/demand_lane.hpp"

#include <utility>

namespace vmigrate::pager {

using wire::PageState;

NearDemandLane::NearDemandLane(FetchCore& core, NearLink near, uint64_t number)
    : core_(core),
      near_(std::move(near)),
      number_(number),
      fetches_(core.fill(), near_.holder->bytes, kDemandFetchesMax) {}

void NearDemandLane::start(uint32_t region_index, PageIndex page, uint64_t at_ns) {
  if (used_count() == 0) heard_ns_ = at_ns;
  if (!near_.link.endpoint->is_device()) return fetches_.start(region_index, PageRun{page, 1});
  size_t slot = 0;
  while (looks_[slot].in_use) ++slot;
  looks_[slot] = Look{{region_index, page}, looks_[slot].generation + 1, true, false};
  ++look_count_;
  ++unposted_look_count_;
}

void NearDemandLane::post() {
  if (failure_) return;
  post_looks();
  if (!failure_ && !fetches_.post(near_.link)) fail(ErrorCode::kDisconnected, "the connection is lost");
}

void NearDemandLane::post_looks() {
  for (size_t slot = 0; slot < looks_.size() && unposted_look_count_ != 0; ++slot) {
    Look& look = looks_[slot];
    if (!look.in_use || look.is_posted) continue;
    const transport::Operation operation{
        .tag = tag_of(slot, look.generation),
        .local = near_.link.map_buffer,
        .local_offset_bytes = slot,
        .remote = near_.link.keys[look.claim.region_index].presence,
        .remote_offset_bytes = raw(look.claim.page),
        .length_bytes = 1,
    };
    const transport::PostResult result = near_.link.endpoint->read({&operation, 1});
    if (result.posted == 1) {
      look.is_posted = true;
      --unposted_look_count_;
    }
    if (result.status == transport::PostStatus::kDisconnected)
      return fail(ErrorCode::kDisconnected, "the connection is lost");
    if (result.posted == 0) return;
  }
}

void NearDemandLane::take_look(const transport::Completion& completion, Polled& polled) {
  const size_t slot = completion.tag & ((uint64_t{1} << kLookSlotBits) - 1);
  if (slot >= looks_.size() || !looks_[slot].in_use || !looks_[slot].is_posted ||
      completion.tag != tag_of(slot, looks_[slot].generation)) {
    return fail(ErrorCode::kProtocol, "completion of an operation that is not outstanding");
  }
  if (completion.result == transport::OpResult::kDisconnected)
    return fail(ErrorCode::kDisconnected, "the connection is lost");
  if (completion.result != transport::OpResult::kOk)
    return fail(ErrorCode::kProtocol, "the states of pages cannot be read");
  const auto state = static_cast<uint8_t>(near_.states[slot]);
  if (state > static_cast<uint8_t>(PageState::kZero))
    return fail(ErrorCode::kProtocol, "a page is in no possible state");
  const Claim claim = looks_[slot].claim;
  looks_[slot].in_use = false;
  --look_count_;
  switch (static_cast<PageState>(state)) {
    case PageState::kPresent:
    case PageState::kZero:  // has no bytes of data there, or a frame of zeros
      return fetches_.start(claim.region_index, PageRun{claim.page, 1});
    case PageState::kAbsent:
    case PageState::kClaimed:
      polled.absent[polled.absent_count++] = claim;
      return;
  }
}

NearDemandLane::Polled NearDemandLane::poll(uint64_t at_ns) {
  Polled polled;
  std::array<transport::Completion, kCompletionBatchMax> completions;
  const size_t count = near_.link.endpoint->poll(completions);
  polled.is_any = count != 0;
  if (count != 0) heard_ns_ = at_ns;
  for (size_t i = 0; i < count && !failure_; ++i) {
    if ((completions[i].tag & kLookFlag) != 0) {
      take_look(completions[i], polled);
      continue;
    }
    const FetchTable::Completed done = fetches_.complete(completions[i]);
    if (done.progress == FetchTable::Progress::kDisconnected)
      fail(ErrorCode::kDisconnected, "the connection is lost");
    if (done.progress == FetchTable::Progress::kFailed) failure_ = done.error;
    if (done.progress != FetchTable::Progress::kFinished && done.progress != FetchTable::Progress::kAbsent)
      continue;
    const Fetch fetch = fetches_.get(done.slot);
    fetches_.release(done.slot);
    // A device's page was seen to be there.
    if (done.progress == FetchTable::Progress::kFinished) {
      core_.counters.near_bytes.fetch_add(fetch.length_bytes, std::memory_order_relaxed);
      polled.here[polled.here_count++] = {fetch.region_index, fetch.run.first};
    } else {
      polled.absent[polled.absent_count++] = {fetch.region_index, fetch.run.first};
    }
  }
  if (!failure_ && count == 0 && near_.link.endpoint->disconnected())
    fail(ErrorCode::kDisconnected, "the connection is lost");
  drop_messages(*near_.link.endpoint);
  return polled;
}

}  // namespace vmigrate::pager

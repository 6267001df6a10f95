#include "fetch/near/reader.hpp"

#include <algorithm>
#include <utility>

#include "base/inject_point.hpp"
#include "base/page_key.hpp"

namespace vmigrate::pager {

using wire::PageState;

NearReader::NearReader(FetchCore& core, NearLink near, uint64_t first_page)
    : core_(core),
      near_(std::move(near)),
      fetches_(core.fill(), near_.holder->bytes, kNearFetchesMax),
      pages_left_(core.fill().page_count()) {
  uint64_t left = first_page % core.fill().page_count();
  while (left >= core.fill().region(region_index_).page_count())
    left -= core.fill().region(region_index_++).page_count();
  page_ = left;
}

void NearReader::look_again() {
  is_exhausted_ = false;
  due_ns_ = 0;
  pause_ns_ = kNearPauseNsMin;
  // The page may lie where this pass has been.
  has_missing_ = true;
}

void NearReader::follow(uint32_t region_index, PageIndex page) {
  const FilledRegion& region = core_.fill().region(region_index);
  const uint64_t first = raw(page) + 1;
  if (first >= region.page_count()) return;
  wanted_region_ = region_index;
  wanted_ =
      PageRun{PageIndex{first},
              std::min({region.pages_in(kNearFollowBytes), region.page_count() - first, look_pages_max()})};
}

/// Moves the pass on, through all regions and round again.
void NearReader::pass_over(uint64_t page_count) {
  page_count = std::min(page_count, pages_left_);
  pages_left_ -= page_count;
  page_ += page_count;
  if (page_ < core_.fill().region(region_index_).page_count()) return;
  page_ = 0;
  region_index_ = (region_index_ + 1) % static_cast<uint32_t>(core_.fill().regions().size());
}

/// The next window of the pass that begins with a page which is absent here. False: the pass is over.
bool NearReader::next_window() {
  while (pages_left_ != 0) {
    const FilledRegion& region = core_.fill().region(region_index_);
    const uint64_t region_left = region.page_count() - page_;
    if (region_index_ >= core_.maps_known()) {
      // Some of its pages are holes, and it is not known yet which.
      has_missing_ = true;
      pass_over(region_left);
      continue;
    }
    const uint64_t skipped = raw(region.presence->next_absent(PageIndex{page_})) - page_;
    if (skipped != 0) {
      pass_over(skipped);
      continue;
    }
    window_region_ = region_index_;
    window_ = {PageIndex{page_}, std::min({look_pages_max(), region_left, pages_left_})};
    pass_over(window_.count);
    return true;
  }
  return false;
}

void NearReader::end_pass(uint64_t at_ns) {
  is_exhausted_ = !has_news_ && !has_missing_;
  pause_ns_ = has_news_ ? kNearPauseNsMin : std::min(2 * pause_ns_, kNearPauseNsMax);
  due_ns_ = is_exhausted_ ? UINT64_MAX : at_ns + std::max(pause_ns_, states_read_ * kNearPauseNsPerState);
  pages_left_ = core_.fill().page_count();
  has_news_ = has_missing_ = false;
  states_read_ = 0;
}

/// False: there is nothing to look at just now.
bool NearReader::choose_window(uint64_t at_ns) {
  if (wanted_ && may_follow_ && wanted_region_ < core_.maps_known()) {
    window_region_ = wanted_region_;
    window_ = *std::exchange(wanted_, std::nullopt);
    may_follow_ = false;
    return true;
  }
  may_follow_ = true;
  if (at_ns < due_ns_) return false;
  if (next_window()) return true;
  end_pass(at_ns);
  return false;
}

void NearReader::post_look() {
  const transport::Operation operation{
      .tag = kLookFlag | look_count_,
      .local = near_.link.map_buffer,
      .local_offset_bytes = 0,
      .remote = near_.link.keys[window_region_].presence,
      .remote_offset_bytes = raw(window_.first),
      .length_bytes = static_cast<uint32_t>(window_.count),
  };
  const transport::PostResult result = near_.link.endpoint->read({&operation, 1});
  if (result.posted == 1) looking_ = Looking::kWait;
  if (result.status == transport::PostStatus::kDisconnected)
    fail(ErrorCode::kDisconnected, "the connection is lost");
}

void NearReader::take_look(const transport::Completion& completion) {
  if (looking_ != Looking::kWait || completion.tag != (kLookFlag | look_count_))
    return fail(ErrorCode::kProtocol, "completion of an operation that is not outstanding");
  if (completion.result == transport::OpResult::kDisconnected)
    return fail(ErrorCode::kDisconnected, "the connection is lost");
  if (completion.result != transport::OpResult::kOk)
    return fail(ErrorCode::kProtocol, "the states of pages cannot be read");
  for (uint64_t i = 0; i < window_.count; ++i)
    if (static_cast<uint8_t>(near_.states[i]) > static_cast<uint8_t>(PageState::kZero))
      return fail(ErrorCode::kProtocol, "a page is in no possible state");
  ++look_count_;
  states_read_ += window_.count;
  window_at_ = raw(window_.first);
  looking_ = Looking::kKnown;
}

/// Claims the next run of the window that is present there and absent here.
std::optional<PageRun> NearReader::claim_in_window(uint64_t chunk_bytes) {
  const FilledRegion& region = core_.fill().region(window_region_);
  memory::PresenceMap& presence = *region.presence;
  const uint64_t count_max = region.pages_in(chunk_bytes);
  const uint64_t end = raw(window_.first) + window_.count;
  const auto state_there = [&](uint64_t page) {
    return PageState{static_cast<uint8_t>(near_.states[page - raw(window_.first)])};
  };
  while ((window_at_ = raw(presence.next_absent(PageIndex{window_at_}))) < end) {
    if (state_there(window_at_) != PageState::kPresent) {
      // Only the root says what is zero.
      has_missing_ |= state_there(window_at_) != PageState::kZero;
      ++window_at_;
      continue;
    }
    const PageIndex first{window_at_};
    uint64_t there = 1;
    while (there < count_max && window_at_ + there < end &&
           state_there(window_at_ + there) == PageState::kPresent)
      ++there;
    const uint64_t count = presence.claim_run(first, there);
    window_at_ += std::max<uint64_t>(count, 1);
    if (count != 0) return PageRun{first, count};
  }
  return std::nullopt;
}

NearReader::Step NearReader::step(uint64_t at_ns, uint64_t chunk_bytes) {
  if (failure_ || fetches_.has_unposted()) return Step::kNothing;
  if (looking_ == Looking::kKnown && fetches_.free_count() != 0) {
    if (const auto run = claim_in_window(chunk_bytes)) {
      inject_point(wire::InjectPoint::kImageNearClaimed, page_key(window_region_, run->first));
      has_news_ = true;
      if (!is_waiting()) heard_ns_ = at_ns;
      fetches_.start(window_region_, *run);
      if (!fetches_.post(near_.link)) fail(ErrorCode::kDisconnected, "the connection is lost");
      return Step::kClaimed;
    }
    looking_ = Looking::kNo;
  }
  if (looking_ == Looking::kNo && choose_window(at_ns)) looking_ = Looking::kPost;
  if (looking_ != Looking::kPost) return Step::kNothing;
  if (!is_waiting()) heard_ns_ = at_ns;
  post_look();
  return looking_ == Looking::kWait ? Step::kLooks : Step::kNothing;
}

bool NearReader::post_again() {
  if (failure_) return false;
  if (!is_waiting()) heard_ns_ = now_ns();
  if (fetches_.has_unposted() && !fetches_.post(near_.link))
    fail(ErrorCode::kDisconnected, "the connection is lost");
  if (!failure_ && looking_ == Looking::kPost) post_look();
  return !failure_ && (fetches_.has_unposted() || looking_ == Looking::kPost);
}

NearReader::Polled NearReader::poll(uint64_t at_ns) {
  Polled polled;
  std::array<transport::Completion, kCompletionBatchMax> completions;
  const size_t count = near_.link.endpoint->poll(completions);
  polled.is_any = count != 0;
  if (count != 0) heard_ns_ = at_ns;
  for (size_t i = 0; i < count && !failure_; ++i) {
    if ((completions[i].tag & kLookFlag) != 0) {
      take_look(completions[i]);
      continue;
    }
    const FetchTable::Completed done = fetches_.complete(completions[i]);
    switch (done.progress) {
      case FetchTable::Progress::kMore:
        break;
      case FetchTable::Progress::kFinished:
        polled.here[polled.here_count++] = fetches_.get(done.slot);
        fetches_.release(done.slot);
        break;
      case FetchTable::Progress::kAbsent:
        // Left in its slot, and given up with the connection.
        fail(ErrorCode::kProtocol, "a page that was present is absent");
        break;
      case FetchTable::Progress::kDisconnected:
        fail(ErrorCode::kDisconnected, "the connection is lost");
        break;
      case FetchTable::Progress::kFailed:
        failure_ = done.error;
        break;
    }
  }
  if (!failure_ && count == 0 && near_.link.endpoint->disconnected())
    fail(ErrorCode::kDisconnected, "the connection is lost");
  return polled;
}

}  // namespace vmigrate::pager

#include "tests/fuzz/support/near_drive.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

namespace vmigrate::fuzz {

using transport::OpResult;
using wire::PageState;

NearDrive::NearDrive(Filling& filling, const Settings& settings, size_t states_max)
    : filling_(filling),
      near_{std::make_shared<pager::NearHolder>(1, 0), std::vector<std::byte>(states_max), {}},
      model_(filling, near_.states, (settings.mode & kDemandLane) == 0),
      pattern_(settings.pattern) {
  model_.control().is_device = (settings.mode & kDevice) != 0;
  near_.link = model_.link();
}

void NearDrive::take(const Event& event, Input& input) {
  switch (static_cast<What>(event.what % 8)) {
    case What::kAsk:
      return ask(event);
    case What::kAnswer:
      return answer(event, input);
    case What::kPoll:
      return poll((event.flags & kRefused) != 0);
    case What::kPost:
      return set_room(event);
    case What::kOther:
      return change_page(event);
    case What::kFollow:
      return follow(event);
    case What::kKnown:
      return set_known(event.value % (filling_.region_count() + 1));
    case What::kHolder:
      pattern_ = event.place;
      return;
  }
}

void NearDrive::finish(Input& input) {
  model_.control().room = SIZE_MAX;
  for (int at = 0; at < 16; at += 2)
    if ((pattern_ >> at & 3) < 2) pattern_ = static_cast<uint16_t>((pattern_ & ~(3 << at)) | 2 << at);
  set_known(filling_.region_count());
  for (uint64_t i = 0; !has_failed() && !has_all(); ++i) {
    VMG_CHECK(i < 3 * filling_.fill().page_count() + 100);
    post();
    ask_for_all();
    while (!model_.unanswered().empty()) answer({}, input);
    while (!has_failed() && !model_.control().completions.empty()) poll(false);
  }
}

void NearDrive::set_known(uint32_t region_count) {
  filling_.core().set_maps_known(std::max(filling_.core().maps_known(), region_count));
  look_again();
}

void NearDrive::set_room(const Event& event) {
  model_.control().room = event.value == 0 ? SIZE_MAX : event.value - 1;
  model_.control().is_cut |= (event.flags & kCut) != 0;
  post();
}

void NearDrive::answer(const Event& event, Input& input) {
  uint64_t tag = model_.any_tag();
  if (auto& unanswered = model_.unanswered(); !unanswered.empty()) {
    const auto chosen = unanswered.begin() + static_cast<std::ptrdiff_t>(event.place % unanswered.size());
    tag = chosen->tag;
    unanswered.erase(chosen);
  }
  if ((event.flags & kOtherTag) != 0) tag ^= uint64_t{1} << event.value % 64;
  const auto result =
      (event.flags & kOtherResult) != 0 ? static_cast<OpResult>(1 + event.value % 8) : OpResult::kOk;
  if (const auto look = model_.look_of(tag)) write_states(*look, event, input);
  for (int i = 0; i < ((event.flags & kTwice) != 0 ? 2 : 1); ++i)
    model_.control().completions.push_back({tag, result, 0});
}

void NearDrive::write_states(const NearModel::Look& look, const Event& event, Input& input) {
  const auto& buffer = model_.control().locals.back();
  const std::span<std::byte> out(buffer.base + look.operation.local_offset_bytes, look.run.count);
  const uint64_t part_pages = std::max<uint64_t>(1, filling_.page_count(look.region_index) / 8);
  for (uint64_t page = raw(look.run.first), left = out.size(); left != 0;) {
    const uint64_t part = page / part_pages, count = std::min(left, part_pages - page % part_pages);
    std::memset(&out[out.size() - left], pattern_ >> 2 * (part % 8) & 3, count);
    page += count;
    left -= count;
  }
  if ((event.flags & kRaw) != 0) {
    const auto bytes = input.bytes(std::min<size_t>(out.size(), event.value));
    std::copy(bytes.begin(), bytes.end(), out.begin());
  }
  if ((event.flags & kSpoiled) != 0) out[event.place % out.size()] ^= std::byte{event.value};
}

/// Somebody else claims a page, brings it, or gives it up.
void NearDrive::change_page(const Event& event) {
  const uint32_t region = region_of(event);
  const PageRun page{page_of(event), 1};
  memory::PresenceMap& presence = filling_.presence(region);
  if (presence.claim(page.first)) {
    VMG_CHECK(model_.state(region, raw(page.first)) == PageState::kAbsent);
    model_.set_state(region, page, PageState::kClaimed);
    others_.emplace_back(region, page.first);
    return;
  }
  const auto other = std::find(others_.begin(), others_.end(), std::pair(region, page.first));
  if (other == others_.end()) return;
  others_.erase(other);
  end_claim(region, page, (event.flags & kGivesUp) != 0);
}

void NearDrive::check_failure(const std::optional<Error>& failure, const std::optional<ErrorCode>& expected) {
  VMG_CHECK(failure.has_value() == expected.has_value() && (!failure || failure->code == *expected));
}

void NearDrive::check_post(const std::optional<Error>& failure) const {
  VMG_CHECK(!failure || (model_.control().is_cut && failure->code == ErrorCode::kDisconnected));
}

NearModel::Outcome NearDrive::judge() {
  const auto& completions = model_.control().completions;
  auto outcome =
      model_.judge(std::span(completions).first(std::min(completions.size(), pager::kCompletionBatchMax)));
  for (const NearModel::Claim& claim : outcome.here) here_bytes_ += model_.length_bytes(claim);
  return outcome;
}

void NearDrive::end_claim(uint32_t region_index, PageRun run, bool gives_up) {
  memory::PresenceMap& presence = filling_.presence(region_index);
  gives_up ? presence.unclaim(run) : presence.publish(run);
  model_.set_state(region_index, run, gives_up ? PageState::kAbsent : PageState::kPresent);
  if (gives_up) look_again();
}

void NearDrive::check(const pager::NearHolder& holder, uint64_t silent_ns) {
  VMG_CHECK((silent_ns == UINT64_MAX) == !model_.is_waiting());
  VMG_CHECK(holder.bytes.load() == here_bytes_);
  model_.check_states();
}

void NearDrive::check_end() {
  VMG_CHECK(model_.claims().empty() && model_.control().is_gone);
  model_.check_states();
}

}  // namespace vmigrate::fuzz

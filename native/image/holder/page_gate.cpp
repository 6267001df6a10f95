#include "image/holder/page_gate.hpp"

#include <algorithm>
#include <cstring>

#include "base/inject_point.hpp"
#include "base/page_key.hpp"
#include "memory/shrink_guard.hpp"

namespace vmigrate::pager {
namespace {

/// Pages that may be refused in the life of a session. A memory or a network that damages more is not to be
/// relied on, and each refusal costs another READ.
constexpr uint64_t kRefusedPagesMax = 64;

struct PageBytes {
  std::byte* at;
  uint64_t length_bytes;
};

void wipe_bytes(void* context) {
  const PageBytes& bytes = *static_cast<PageBytes*>(context);
  std::memset(bytes.at, 0, bytes.length_bytes);
}

}  // namespace

Status PageGate::open() {
  if (digests_ == nullptr) return ok();
  auto hasher = memory::PageHasher::create();
  if (!hasher) return hasher.error();
  hasher_ = std::move(hasher).value();
  return ok();
}

uint64_t PageGate::publish(uint32_t region_index, PageRun run, Origin origin) {
  const uint64_t end = raw(run.first) + run.count;
  if (digests_ == nullptr) {
    let_pass(region_index, run, end);
    return 0;
  }
  const FilledRegion& region = core_.region(region_index);
  const memory::DigestMap& map = digests_->map(region_index);
  const uint64_t checked_end = std::clamp(map.known(), raw(run.first), end);
  uint64_t good = raw(run.first), refused = 0;
  hasher_->begin(region.file->fd(), region.page_bytes(), {run.first, checked_end - good});
  for (uint64_t page = good; page < checked_end; ++page) {
    const auto found = hasher_->next();
    if (!found) {
      fetch_.owner().fail(found.error());
      return refused;
    }
    if (found.value() == map.digest(PageIndex{page})) continue;
    let_pass(region_index, {PageIndex{good}, page - good}, page);
    ++refused;
    if (!refuse(region_index, PageIndex{page}, origin)) return refused;
    good = page + 1;
  }
  let_pass(region_index, {PageIndex{good}, end - good}, checked_end);
  return refused;
}

/// The pages from `unchecked_page` on had no digest when they were looked at.
void PageGate::let_pass(uint32_t region_index, PageRun run, uint64_t unchecked_page) {
  if (run.count == 0) return;
  core_.region(region_index).presence->publish(run);
  inject_point(wire::InjectPoint::kImagePublished, page_key(region_index, run.first));
  const uint64_t end = raw(run.first) + run.count;
  if (unchecked_page < end && digests_ != nullptr &&
      !is_right_after_all(region_index, {PageIndex{unchecked_page}, end - unchecked_page})) {
    return;
  }
  if (wakes_) core_.wake_waits();
  core_.fill().add_present(run.count);
}

/// Pages that are present, and not yet counted, so that no image is complete before they have been looked at.
bool PageGate::is_right_after_all(uint32_t region_index, PageRun run) {
  // F15 pairs with F16 in DigestMap::append: the states stored before, the number of digests looked at after.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const FilledRegion& region = core_.region(region_index);
  const memory::DigestMap& map = digests_->map(region_index);
  const uint64_t end = std::clamp(map.known(), raw(run.first), raw(run.first) + run.count);
  hasher_->begin(region.file->fd(), region.page_bytes(), {run.first, end - raw(run.first)});
  for (uint64_t page = raw(run.first); page < end; ++page) {
    const auto found = hasher_->next();
    const bool is_right = found && found.value() == map.digest(PageIndex{page});
    if (is_right) continue;
    fetch_.owner().fail(
        found ? Error{ErrorCode::kDamaged, 0, "a page that clones may have seen is not what its digest says"}
              : found.error());
    return false;
  }
  return true;
}

/// The page is asked for again. Its bytes are wiped, because the holder may call it a hole next.
bool PageGate::refuse(uint32_t region_index, PageIndex page, Origin origin) {
  const FilledRegion& region = core_.region(region_index);
  PageBytes bytes{region.file->base() + raw(page) * region.page_bytes(), region.page_bytes()};
  if (!memory::touch_guarded(wipe_bytes, &bytes)) {
    fetch_.owner().fail({ErrorCode::kRegionChanged, 0, "region file changed its length"});
    return false;
  }
  // Relaxed: a limit, and a number to show.
  FetchCounters& counters = fetch_.counters;
  auto& refused = origin == Origin::kRoot ? counters.refused_pages : counters.near_refused_pages;
  const uint64_t before = refused.fetch_add(1, std::memory_order_relaxed);
  if (origin == Origin::kRoot && before >= kRefusedPagesMax) {
    fetch_.owner().fail({ErrorCode::kDamaged, 0, "too many pages are not what their digests say"});
    return false;
  }
  give_back(region_index, {page, 1});
  return true;
}

void PageGate::give_back(uint32_t region_index, PageRun run) {
  core_.region(region_index).presence->unclaim(run);
  if (wakes_) core_.wake_waits();
  fetch_.note_unclaimed();
}

bool PageGate::may_be_zero(uint32_t region_index, PageIndex page) const {
  if (digests_ == nullptr) return true;
  const memory::DigestMap& map = digests_->map(region_index);
  return raw(page) >= map.known() ||
         map.digest(page) == memory::digest_of_zeros(digests_->page_bytes(region_index));
}

bool PageGate::zeros_are_right(uint32_t region_index, PageRun run) {
  if (digests_ == nullptr) return true;
  // F15 pairs with F16 in DigestMap::append: the states stored before, the number of digests looked at after.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const memory::PresenceMap& presence = *core_.region(region_index).presence;
  for (uint64_t page = raw(run.first); page < raw(run.first) + run.count; ++page) {
    if (presence.state(PageIndex{page}) != wire::PageState::kZero ||
        may_be_zero(region_index, PageIndex{page})) {
      continue;
    }
    fetch_.owner().fail({ErrorCode::kDamaged, 0, "a hole of the holder is not a page of zeros"});
    return false;
  }
  return true;
}

}  // namespace vmigrate::pager

#include "fetch/prefetch.hpp"

#include <algorithm>
#include <utility>

#include "base/inject_point.hpp"

namespace vmigrate::pager {

using wire::PageState;

Prefetch::Prefetch(FetchCore& core, const DataMapReader& maps, const ServiceRate& rate)
    : core_(core), maps_(maps), size_(core, rate), sweep_page_(core.fill().regions().size(), 0) {}

std::optional<Prefetch::Claimed> Prefetch::claim_next(uint64_t at_ns) {
  while (const PageKey fault = core_.recent_faults.pop()) follow(fault);
  const uint64_t chunk_bytes = size_.chunk_bytes(at_ns);
  if (const uint64_t count = core_.unclaimed_count(); count != unclaimed_count_) {
    unclaimed_count_ = count;
    std::fill(sweep_page_.begin(), sweep_page_.end(), 0);
  }
  auto claimed = claim_from_streams(chunk_bytes);
  if (!claimed) claimed = claim_from_order(chunk_bytes);
  if (!claimed) claimed = claim_from_sweep(chunk_bytes);
  if (!claimed && std::exchange(sweeps_again_, false)) {
    std::fill(sweep_page_.begin(), sweep_page_.end(), 0);
    claimed = claim_from_sweep(chunk_bytes);
  }
  if (claimed) {
    size_.grow();
    inject_point(wire::InjectPoint::kTargetPrefetchClaimed,
                 page_key(claimed->region_index, claimed->run.first));
  }
  return claimed;
}

/// A fault near the position of a stream continues that stream. Any other fault starts a stream in place of
/// the one that was unused longest.
void Prefetch::follow(PageKey fault) {
  const uint32_t region_index = key_region(fault);
  const uint64_t page = raw(key_page(fault));
  const uint64_t bytes = page_bytes(region_index);
  Stream* oldest = &streams_[0];
  for (Stream& stream : streams_) {
    const uint64_t window_pages = std::max<uint64_t>(1, stream.window_bytes / bytes);
    if (stream.used_at != 0 && stream.region_index == region_index &&
        page + window_pages >= stream.next_page && page <= stream.next_page + window_pages) {
      stream.window_bytes = std::min<uint64_t>(stream.window_bytes * 2, core_.options().prefetch_bytes_max);
      stream.next_page = std::max(stream.next_page, page + 1);
      stream.pages_left = std::max<uint64_t>(1, stream.window_bytes / bytes);
      stream.used_at = ++stream_uses_;
      return;
    }
    if (stream.used_at < oldest->used_at) oldest = &stream;
  }
  const uint64_t window_bytes = std::min<uint64_t>(kStreamBytesFirst, core_.options().prefetch_bytes_max);
  *oldest = Stream{.region_index = region_index,
                   .next_page = page + 1,
                   .pages_left = std::max<uint64_t>(1, window_bytes / bytes),
                   .window_bytes = window_bytes,
                   .used_at = ++stream_uses_};
}

std::optional<Prefetch::Claimed> Prefetch::claim_from_streams(uint64_t chunk_bytes) {
  for (;;) {
    Stream* latest = nullptr;
    for (Stream& stream : streams_) {
      if (stream.pages_left != 0 && maps_.known(stream.region_index) &&
          (latest == nullptr || stream.used_at > latest->used_at)) {
        latest = &stream;
      }
    }
    if (latest == nullptr) return std::nullopt;
    Stream& stream = *latest;
    memory::PresenceMap& presence = *core_.fill().region(stream.region_index).presence;
    while (stream.pages_left != 0) {
      if (stream.next_page >= presence.page_count()) {
        stream.pages_left = 0;
        break;
      }
      const PageIndex first{stream.next_page};
      const uint64_t count_max =
          std::min(stream.pages_left, std::max<uint64_t>(1, chunk_bytes / page_bytes(stream.region_index)));
      const uint64_t count = presence.claim_run(first, count_max);
      const uint64_t passed = std::max<uint64_t>(count, 1);
      stream.next_page += passed;
      stream.pages_left -= passed;
      if (count != 0) return Claimed{stream.region_index, PageRun{first, count}};
    }
  }
}

/// Goes through the order once. A claim that is given up later is left to the sweep.
std::optional<Prefetch::Claimed> Prefetch::claim_from_order(uint64_t chunk_bytes) {
  if (auto order = core_.take_order()) {
    order_ = std::move(*order);
    ordered_.reset();
  }
  for (;;) {
    if (!ordered_) ordered_ = order_.next(chunk_bytes);
    if (!ordered_ || !maps_.known(ordered_->region_index)) return std::nullopt;
    memory::PresenceMap& presence = *core_.fill().region(ordered_->region_index).presence;
    PageRun& left = ordered_->pages;
    const uint64_t end = raw(left.first) + left.count;
    const uint64_t page = std::min(end, raw(presence.next_absent(left.first)));
    const PageIndex first{page};
    const uint64_t count_max =
        std::min(end - page, std::max<uint64_t>(1, chunk_bytes / page_bytes(ordered_->region_index)));
    const uint64_t count = page == end ? 0 : presence.claim_run(first, count_max);
    const Claimed claimed{ordered_->region_index, PageRun{first, count}};
    left = {PageIndex{page + count}, end - page - count};
    if (left.count == 0) ordered_.reset();
    if (count == 0) continue;
    core_.counters.ordered_bytes.fetch_add(count * page_bytes(claimed.region_index),
                                           std::memory_order_relaxed);
    return claimed;
  }
}

std::optional<Prefetch::Claimed> Prefetch::claim_from_sweep(uint64_t chunk_bytes) {
  for (uint32_t region_index = 0; region_index < sweep_page_.size() && maps_.known(region_index);
       ++region_index) {
    memory::PresenceMap& presence = *core_.fill().region(region_index).presence;
    uint64_t& page = sweep_page_[region_index];
    while (page < presence.page_count()) {
      page = raw(presence.next_absent(PageIndex{page}));
      if (page == presence.page_count()) break;
      const PageIndex first{page};
      const uint64_t count =
          presence.claim_run(first, std::max<uint64_t>(1, chunk_bytes / page_bytes(region_index)));
      page += count;
      if (count != 0) return Claimed{region_index, PageRun{first, count}};
    }
  }
  return std::nullopt;
}

}  // namespace vmigrate::pager

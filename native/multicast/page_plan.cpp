#include "multicast/page_plan.hpp"

#include <algorithm>
#include <bit>

namespace vmigrate::multicast {
namespace {

constexpr uint64_t kClusterPages = kWantedBytes / kPageBytes;

}  // namespace

uint64_t PagePlan::Pages::first_left(uint64_t from, uint64_t end) const {
  while (from < end) {
    const uint64_t word = left[from / 64] >> (from % 64);
    if (word != 0) return std::min<uint64_t>(end, from + static_cast<uint64_t>(std::countr_zero(word)));
    from = (from / 64 + 1) * 64;
  }
  return end;
}

Result<PagePlan> PagePlan::of(std::span<const std::unique_ptr<memory::Region>> regions,
                              std::vector<uint32_t> order) {
  PagePlan plan;
  memory::Clusters clusters;
  for (const auto& region : regions) {
    Pages& pages = plan.regions_.emplace_back();
    pages.page_count = region->page_count();
    clusters.add_region(region->length_bytes(), region->page_bytes());
    pages.left.assign((pages.page_count + 63) / 64, 0);
    const Status walked = region->each_data_run([&](PageRun run) {
      for (uint64_t page = raw(run.first); page < raw(run.first) + run.count; ++page)
        pages.left[page / 64] |= uint64_t{1} << (page % 64);
      plan.page_count_ += run.count;
    });
    if (!walked) return walked.error();
  }
  plan.left_count_ = plan.page_count_;
  plan.order_ = {std::move(clusters), std::move(order)};
  return plan;
}

void PagePlan::want(uint32_t region_index, PageIndex page) {
  if (region_index >= regions_.size() || raw(page) >= regions_[region_index].page_count) return;
  const uint64_t first = raw(page) / kClusterPages * kClusterPages;
  const uint64_t end = std::min(first + kClusterPages, regions_[region_index].page_count);
  if (regions_[region_index].first_left(first, end) == end) return;
  for (size_t i = 0; i < wanted_count_; ++i) {
    const Piece& known = wanted_[(wanted_head_ + i) % wanted_.size()];
    if (known.region_index == region_index && raw(known.run.first) == first) return;
  }
  if (wanted_count_ == wanted_.size()) {
    wanted_head_ = (wanted_head_ + 1) % wanted_.size();
    --wanted_count_;
  }
  wanted_[(wanted_head_ + wanted_count_++) % wanted_.size()] = {region_index,
                                                                {PageIndex{first}, end - first}};
}

PagePlan::Piece PagePlan::take(uint32_t region_index, uint64_t first, uint64_t end) {
  Pages& pages = regions_[region_index];
  uint64_t page = first;
  for (; page < end && pages.has(page); ++page) pages.left[page / 64] &= ~(uint64_t{1} << (page % 64));
  left_count_ -= page - first;
  return {region_index, {PageIndex{first}, page - first}};
}

std::optional<PagePlan::Piece> PagePlan::take_ordered(uint64_t count_max) {
  for (;; ordered_.reset()) {
    if (!ordered_) ordered_ = order_.next(count_max * kPageBytes);
    if (!ordered_) return std::nullopt;
    const PageRun& pages = ordered_->pages;
    const uint64_t end = raw(pages.first) + pages.count;
    const uint64_t first = regions_[ordered_->region_index].first_left(raw(pages.first), end);
    if (first < end) return take(ordered_->region_index, first, std::min(end, first + count_max));
  }
}

std::optional<PagePlan::Piece> PagePlan::next(uint64_t count_max) {
  while (wanted_count_ != 0) {
    const Piece& cluster = wanted_[wanted_head_];
    const uint64_t end = raw(cluster.run.first) + cluster.run.count;
    const uint64_t first = regions_[cluster.region_index].first_left(raw(cluster.run.first), end);
    if (first < end) return take(cluster.region_index, first, std::min(end, first + count_max));
    wanted_head_ = (wanted_head_ + 1) % wanted_.size();
    --wanted_count_;
  }
  if (auto piece = take_ordered(count_max)) return piece;
  for (; sweep_region_ < regions_.size(); ++sweep_region_, sweep_page_ = 0) {
    const uint64_t end = regions_[sweep_region_].page_count;
    sweep_page_ = regions_[sweep_region_].first_left(sweep_page_, end);
    if (sweep_page_ < end) return take(sweep_region_, sweep_page_, std::min(end, sweep_page_ + count_max));
  }
  return std::nullopt;
}

}  // namespace vmigrate::multicast

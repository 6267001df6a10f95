#include "source/dirty_maps.hpp"

#include <bit>

namespace vmigrate::pager {
namespace {

uint64_t count_common(std::span<const std::byte> a, std::span<const std::byte> b) {
  uint64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i)
    count += static_cast<uint64_t>(std::popcount(std::to_integer<uint8_t>(a[i] & b[i])));
  return count;
}

}  // namespace

Result<std::unique_ptr<DirtyMaps>> DirtyMaps::start(const VmMemory& memory) {
  auto tracker = WriteTracker::start(memory);
  if (!tracker) return tracker.error();
  std::unique_ptr<DirtyMaps> maps(new DirtyMaps());
  maps->tracker_ = std::move(tracker).value();
  return maps;
}

Status DirtyMaps::add(const memory::Region& region) {
  auto map = DataMap::create(region.page_count(), DataMap::Kind::kDirty);
  if (!map) return map.error();
  regions_.push_back({region.page_bytes(), std::move(map).value(), {}});
  return ok();
}

/// A page of the region may consist of many pages of the kernel.
PageRun DirtyMaps::pages_in(const RegionMap& region, uint64_t offset_bytes, uint64_t length_bytes) {
  const uint64_t first = offset_bytes / region.page_bytes;
  const uint64_t end = (offset_bytes + length_bytes + region.page_bytes - 1) / region.page_bytes;
  return {PageIndex{first}, end - first};
}

Result<bool> DirtyMaps::has_changed_since_last() const {
  if (!has_last_) return Error{ErrorCode::kInvalidArgument, 0, "there was no last round"};
  bool has_changed = false;
  const Status taken =
      tracker_->take_last([&](uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes) {
        const RegionMap& region = regions_[region_index];
        has_changed |= !region.map->has_all(pages_in(region, offset_bytes, length_bytes));
      });
  if (!taken) return taken.error();
  return has_changed;
}

Result<DirtyMaps::Round> DirtyMaps::note(bool is_last) {
  if (has_last_) return Error{ErrorCode::kInvalidArgument, 0, "a round after the last one"};
  for (RegionMap& region : regions_) {
    const auto bits = region.map->bits();
    if (!is_last) region.bits_before.assign(bits.begin(), bits.end());
    region.map->begin();
  }
  const auto set = [this](uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes) {
    const RegionMap& region = regions_[region_index];
    region.map->set(pages_in(region, offset_bytes, length_bytes));
  };
  const Status taken = is_last ? tracker_->take_last(set) : tracker_->take(set);
  if (!taken) return taken.error();
  has_last_ = is_last;
  Round round{.number = ++round_};
  for (const RegionMap& region : regions_) {
    const uint64_t page_count = region.map->count();
    region.map->finish(page_count, round.number);
    round.page_count += page_count;
    if (!is_last) round.again_count += count_common(region.map->bits(), region.bits_before);
  }
  return round;
}

}  // namespace vmigrate::pager

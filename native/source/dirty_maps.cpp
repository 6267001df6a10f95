#include "source/dirty_maps.hpp"

namespace vmigrate::pager {

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
  regions_.push_back({region.page_bytes(), std::move(map).value()});
  return ok();
}

Result<DirtyMaps::Round> DirtyMaps::note(bool is_last) {
  if (has_last_) return Error{ErrorCode::kInvalidArgument, 0, "a round after the last one"};
  for (RegionMap& region : regions_) region.map->begin();
  // A page of the region may consist of many pages of the kernel.
  const auto set = [this](uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes) {
    const RegionMap& region = regions_[region_index];
    const uint64_t first = offset_bytes / region.page_bytes;
    const uint64_t end = (offset_bytes + length_bytes + region.page_bytes - 1) / region.page_bytes;
    region.map->set({PageIndex{first}, end - first});
  };
  const Status taken = is_last ? tracker_->take_last(set) : tracker_->take(set);
  if (!taken) return taken.error();
  has_last_ = is_last;
  Round round{.number = ++round_};
  for (const RegionMap& region : regions_) {
    const uint64_t page_count = region.map->count();
    region.map->finish(page_count, round.number);
    round.page_count += page_count;
  }
  return round;
}

}  // namespace vmigrate::pager

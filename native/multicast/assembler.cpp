#include "multicast/assembler.hpp"

#include <cstring>

namespace vmigrate::multicast {
namespace {

constexpr uint64_t kGrain = wire::kDatagramGrainBytes;
constexpr uint64_t kWhole = ~uint64_t{0};

/// The bits of `count` grains from the first one on; there are at most 64.
uint64_t grain_bits(uint64_t first, uint64_t count) {
  return (count == 64 ? kWhole : (uint64_t{1} << count) - 1) << first;
}

}  // namespace

bool Assembler::add(uint32_t region_index, uint64_t offset_bytes, std::span<const std::byte> data) {
  const PageIndex page{offset_bytes / kPageBytes};
  const uint64_t in_page_bytes = offset_bytes % kPageBytes;
  if (data.empty() || data.size() % kGrain != 0 || offset_bytes % kGrain != 0 ||
      data.size() > kPageBytes - in_page_bytes || raw(page) >= sink_.page_count(region_index)) {
    return false;
  }
  if (!sink_.wants(region_index, page)) return true;
  if (data.size() == kPageBytes) {
    sink_.take(region_index, page, data);
    return true;
  }
  const size_t slot = slot_of(pager::page_key(region_index, page));
  std::byte* staged_bytes = bytes_.data() + slot * kPageBytes;
  std::memcpy(staged_bytes + in_page_bytes, data.data(), data.size());
  Staged& staged = staged_[slot];
  staged.grains |= grain_bits(in_page_bytes / kGrain, data.size() / kGrain);
  if (staged.grains != kWhole) return true;
  staged.key = 0;
  sink_.take(region_index, page, {staged_bytes, kPageBytes});
  return true;
}

/// The page's place, which begins empty if there was none.
size_t Assembler::slot_of(pager::PageKey key) {
  if (staged_[latest_slot_].key == key) return latest_slot_;
  size_t chosen = 0;
  for (size_t slot = 0; slot < staged_.size(); ++slot) {
    if (staged_[slot].key == key) return latest_slot_ = slot;
    const bool is_better = staged_[slot].key == 0 || staged_[slot].age < staged_[chosen].age;
    if (staged_[chosen].key != 0 && is_better) chosen = slot;
  }
  if (staged_[chosen].key != 0) ++evicted_pages_;
  staged_[chosen] = {key, 0, ++ages_};
  return latest_slot_ = chosen;
}

}  // namespace vmigrate::multicast

#include "memory/touch_order.hpp"

#include <algorithm>
#include <utility>

namespace vmigrate::memory {
namespace {

constexpr uint64_t kClusterBytes = wire::kTouchClusterBytes;
constexpr uint64_t kNumbersMax = UINT32_MAX;  // an entry is the number and one

}  // namespace

void Clusters::add_region(uint64_t length_bytes, uint64_t page_bytes) {
  regions_.push_back({count_, length_bytes, page_bytes});
  count_ += (length_bytes + kClusterBytes - 1) / kClusterBytes;
}

uint64_t Clusters::number(uint32_t region_index, PageIndex page) const {
  const Region& region = regions_[region_index];
  return region.first + raw(page) * region.page_bytes / kClusterBytes;
}

std::optional<Clusters::Place> Clusters::place(uint64_t number) const {
  if (number >= count_) return std::nullopt;
  const auto after =
      std::upper_bound(regions_.begin(), regions_.end(), number,
                       [](uint64_t value, const Region& region) { return value < region.first; });
  const Region& region = *std::prev(after);
  const uint64_t begin_bytes = (number - region.first) * kClusterBytes;
  const uint64_t end_bytes = std::min(begin_bytes + kClusterBytes, region.length_bytes);
  const uint64_t first = begin_bytes / region.page_bytes;
  const uint64_t end = (end_bytes + region.page_bytes - 1) / region.page_bytes;
  return Place{static_cast<uint32_t>(std::prev(after) - regions_.begin()), {PageIndex{first}, end - first}};
}

TouchOrder::TouchOrder(Clusters clusters)
    : clusters_(std::move(clusters)),
      capacity_(std::min<uint64_t>(clusters_.count(), wire::kTouchClustersMax)),
      seen_(std::make_unique<std::atomic<uint64_t>[]>((clusters_.count() + 63) / 64)),
      entries_(std::make_unique<std::atomic<uint32_t>[]>(capacity_)) {}

/// Relaxed: an entry is all that is handed over, and it is one word.
void TouchOrder::touch(uint32_t region_index, PageIndex page) {
  if (taken_.load(std::memory_order_relaxed) >= capacity_) return;
  const uint64_t number = clusters_.number(region_index, page);
  if (number >= clusters_.count() || number >= kNumbersMax) return;
  const uint64_t bit = uint64_t{1} << (number % 64);
  std::atomic<uint64_t>& word = seen_[number / 64];
  // The load saves the write that would take the word from the other processors.
  if ((word.load(std::memory_order_relaxed) & bit) != 0) return;
  if ((word.fetch_or(bit, std::memory_order_relaxed) & bit) != 0) return;
  const uint64_t entry = taken_.fetch_add(1, std::memory_order_relaxed);
  if (entry < capacity_) entries_[entry].store(static_cast<uint32_t>(number + 1), std::memory_order_relaxed);
}

/// It ends at the first entry that somebody has taken and not written yet: what follows is read the next
/// time.
std::vector<uint32_t> TouchOrder::clusters() const {
  const uint64_t count = std::min(taken_.load(std::memory_order_relaxed), capacity_);
  std::vector<uint32_t> order;
  order.reserve(count);
  for (uint64_t i = 0; i < count; ++i) {
    const uint32_t entry = entries_[i].load(std::memory_order_relaxed);
    if (entry == 0) break;
    order.push_back(entry - 1);
  }
  return order;
}

std::optional<Clusters::Place> OrderedPages::next(uint64_t length_bytes_max) {
  while (at_ < order_.size()) {
    auto found = clusters_.place(order_[at_++]);
    if (!found) continue;
    const uint64_t pages_max = length_bytes_max / clusters_.page_bytes(found->region_index);
    for (; at_ < order_.size(); ++at_) {
      const auto following = clusters_.place(order_[at_]);
      if (!following || following->region_index != found->region_index ||
          raw(following->pages.first) != raw(found->pages.first) + found->pages.count ||
          found->pages.count + following->pages.count > pages_max) {
        break;
      }
      found->pages.count += following->pages.count;
    }
    return found;
  }
  return std::nullopt;
}

}  // namespace vmigrate::memory

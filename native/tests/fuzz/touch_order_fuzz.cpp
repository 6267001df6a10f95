// An order of clusters, as a peer or a file brings it, on an image of any regions.

#include "memory/touch_order.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace vmigrate {
namespace {

constexpr uint64_t kPageSizes[] = {4096, 65536, 2 << 20};

struct Region {
  uint8_t page_size;
  uint16_t page_count;
} __attribute__((packed));

}  // namespace

/// An input: how much is taken at once, the number of regions, the regions, and the order.
std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  for (uint8_t size = 0; size < 3; ++size) {
    for (const uint8_t regions : {1, 3}) {
      Seed seed;
      seed.add(uint32_t{1 << 20}).add(regions);
      for (uint8_t i = 0; i < regions; ++i) seed.add(Region{size, static_cast<uint16_t>(40 + i)});
      for (const uint32_t cluster : {0, 1, 2, 40, 41, 39, 1, 100000}) seed.add(cluster);
      all.push_back(seed);
    }
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  fuzz::Input input(bytes, length_bytes);
  const uint64_t bytes_max = input.take<uint32_t>();
  const size_t region_count = 1 + input.take<uint8_t>() % 4;
  memory::Clusters clusters;
  std::vector<uint64_t> page_counts;
  for (size_t i = 0; i < region_count; ++i) {
    const auto region = input.take<Region>();
    page_counts.push_back(uint64_t{1} + region.page_count);
    const uint64_t page_bytes = kPageSizes[region.page_size % 3];
    clusters.add_region(page_counts.back() * page_bytes, page_bytes);
  }
  std::vector<uint32_t> order;
  while (!input.empty()) order.push_back(input.take<uint32_t>());

  uint64_t named = 0, taken = 0;
  for (const uint32_t number : order) {
    const auto place = clusters.place(number);
    VMG_CHECK(place.has_value() == (number < clusters.count()));
    if (!place) continue;
    VMG_CHECK(place->region_index < region_count && place->pages.count != 0);
    const uint64_t page_count = page_counts[place->region_index];
    VMG_CHECK(raw(place->pages.first) < page_count &&
              place->pages.count <= page_count - raw(place->pages.first));
    VMG_CHECK(clusters.number(place->region_index, place->pages.first) <= number);
    named += place->pages.count;
  }
  memory::OrderedPages pages(clusters, order);
  while (const auto place = pages.next(bytes_max)) {
    VMG_CHECK(place->region_index < region_count && place->pages.count != 0);
    const uint64_t page_count = page_counts[place->region_index];
    VMG_CHECK(raw(place->pages.first) < page_count &&
              place->pages.count <= page_count - raw(place->pages.first));
    taken += place->pages.count;
  }
  VMG_CHECK(taken == named);
  return 0;
}

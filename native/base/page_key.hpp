#pragma once

#include <cstdint>

#include "base/types.hpp"
#include "wire/wire_generated.hpp"

namespace vmigrate::pager {

/// Identifies a page of any region in one word, so that one atomic can hand it between threads. Never zero.
/// Keys are ordered by region, then by page.
using PageKey = uint64_t;

inline constexpr unsigned kPageKeyPageBits = 48;
static_assert(wire::kPreloadRegionsMax < (1u << (64 - kPageKeyPageBits)) - 1);

constexpr PageKey page_key(uint32_t region_index, PageIndex page) {
  return (static_cast<uint64_t>(region_index) + 1) << kPageKeyPageBits | raw(page);
}
constexpr uint32_t key_region(PageKey key) {
  return static_cast<uint32_t>((key >> kPageKeyPageBits) - 1);
}
constexpr PageIndex key_page(PageKey key) {
  return PageIndex{key & ((uint64_t{1} << kPageKeyPageBits) - 1)};
}

}  // namespace vmigrate::pager

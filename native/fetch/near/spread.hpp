#pragma once

#include <cstdint>

namespace vmigrate::pager {

/// Neighbouring pages that one near holder of several is asked for: it has them together, if at all.
inline constexpr uint64_t kNearSpreadPages = 16;

/// Distributes consecutive numbers evenly.
constexpr uint64_t spread(uint64_t number) {
  number ^= number >> 31;
  number *= 0x9e3779b97f4a7c15u;
  number ^= number >> 29;
  number *= 0xbf58476d1ce4e5b9u;
  return number ^ number >> 32;
}

}  // namespace vmigrate::pager

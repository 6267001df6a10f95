#pragma once

#include <cstdint>

namespace vmigrate {

/// Number of a page inside one region. Not interchangeable with addresses or byte offsets.
enum class PageIndex : uint64_t {};
/// Address inside another process (QEMU). It is never dereferenced here.
enum class HostAddr : uint64_t {};

constexpr uint64_t raw(PageIndex page) {
  return static_cast<uint64_t>(page);
}
constexpr uint64_t raw(HostAddr address) {
  return static_cast<uint64_t>(address);
}
constexpr HostAddr operator+(HostAddr base, uint64_t offset_bytes) {
  return HostAddr{raw(base) + offset_bytes};
}

/// A run of pages of one region: [first, first + count).
struct PageRun {
  PageIndex first{0};
  uint64_t count = 0;
};

}  // namespace vmigrate

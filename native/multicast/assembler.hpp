#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "base/page_key.hpp"
#include "multicast/datagram/limits.hpp"
#include "multicast/sink.hpp"

namespace vmigrate::multicast {

/// Puts parts of pages together. A page that came whole goes to the sink as it is. The others wait in a small
/// table; if that is full, the page that has waited longest is given up, so that a lost part costs its page
/// and nothing else. One thread.
class Assembler {
 public:
  explicit Assembler(PageSink& sink) : sink_(sink), bytes_(kStagedPagesMax * kPageBytes) {}

  /// Takes one datagram's data, whose place the sender names. False: no such place, or not in whole grains;
  /// nothing has changed.
  bool add(uint32_t region_index, uint64_t offset_bytes, std::span<const std::byte> data);
  /// Pages that were given up incomplete.
  uint64_t evicted_pages() const { return evicted_pages_; }

 private:
  struct Staged {
    pager::PageKey key = 0;  ///< 0: free
    uint64_t grains = 0;     ///< a bit for each grain that is here
    uint64_t age = 0;
  };
  size_t slot_of(pager::PageKey key);

  PageSink& sink_;
  std::vector<std::byte> bytes_;
  std::array<Staged, kStagedPagesMax> staged_{};
  size_t latest_slot_ = 0;
  uint64_t ages_ = 0;
  uint64_t evicted_pages_ = 0;
};

}  // namespace vmigrate::multicast

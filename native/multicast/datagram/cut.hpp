#pragma once

#include <algorithm>
#include <cstdint>

#include "multicast/datagram/limits.hpp"

namespace vmigrate::multicast {

/// How a page is cut into datagrams: into as few parts as fit, all of the same length, so that the kernel can
/// send many of them as one chain. The last part begins so early that it is as long as the others; what it
/// shares with its neighbour is sent twice.
struct Cut {
  uint32_t part_bytes = 0;  ///< a multiple of the grain; 0: not even a grain fits
  uint32_t part_count = 0;

  /// Where a part begins in its page.
  uint64_t offset_bytes(uint32_t part) const {
    return std::min<uint64_t>(uint64_t{part} * part_bytes, kPageBytes - part_bytes);
  }
};

/// `datagram_bytes_max`: what one datagram may have with its header.
constexpr Cut cut_page(size_t datagram_bytes_max) {
  constexpr uint64_t kGrain = wire::kDatagramGrainBytes;
  if (datagram_bytes_max < wire::kDatagramHeaderBytes + kGrain) return {};
  const uint64_t most_bytes =
      std::min<uint64_t>((datagram_bytes_max - wire::kDatagramHeaderBytes) / kGrain * kGrain, kPageBytes);
  const uint64_t count = (kPageBytes + most_bytes - 1) / most_bytes;
  const uint64_t equal_bytes = ((kPageBytes + count - 1) / count + kGrain - 1) / kGrain * kGrain;
  return {static_cast<uint32_t>(equal_bytes), static_cast<uint32_t>(count)};
}

}  // namespace vmigrate::multicast

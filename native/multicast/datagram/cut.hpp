#pragma once

#include <algorithm>
#include <cstdint>

#include "multicast/datagram/limits.hpp"

namespace vmigrate::multicast {

/// How a page is cut into datagrams: into as few parts as fit, of at most two lengths, so that the kernel can
/// send many of one length as one chain.
struct Cut {
  uint32_t part_count = 0;  ///< 0: not even a grain fits
  uint32_t long_bytes = 0;  ///< of the first parts, a multiple of the grain; the others are a grain shorter
  uint32_t long_count = 0;

  uint32_t part_bytes(uint32_t part) const {
    return part < long_count ? long_bytes : long_bytes - wire::kDatagramGrainBytes;
  }
  /// Where a part begins in its page.
  uint64_t offset_bytes(uint32_t part) const {
    const uint64_t short_before = part - std::min(part, long_count);
    return uint64_t{part} * long_bytes - short_before * wire::kDatagramGrainBytes;
  }
};

/// `datagram_bytes_max`: what one datagram may have with its header.
constexpr Cut cut_page(size_t datagram_bytes_max) {
  constexpr uint32_t kGrain = wire::kDatagramGrainBytes, kGrains = kPageBytes / kGrain;
  if (datagram_bytes_max < wire::kDatagramHeaderBytes + kGrain) return {};
  const auto most = static_cast<uint32_t>(
      std::min<size_t>((datagram_bytes_max - wire::kDatagramHeaderBytes) / kGrain, kGrains));
  const uint32_t count = (kGrains + most - 1) / most;
  const uint32_t long_grains = (kGrains + count - 1) / count;
  return {count, long_grains * kGrain, kGrains - count * (long_grains - 1)};
}

}  // namespace vmigrate::multicast

#pragma once

#include <sys/types.h>

#include <cstdint>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "memory/region_config.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

// What we believe about another process's mappings is checked against what the kernel and the files say,
// never taken from a message or a saved file on trust.

struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  bool operator==(const FileIdentity&) const = default;
};

/// kRegionChanged if the file is not a regular file of exactly the configured length.
Result<FileIdentity> identify(const RegionFileConfig& region);

/// kInvalidArgument unless every path is absolute, lengths are whole pages of a sane size and there are 1 to
/// wire::kPreloadRegionsMax of them.
Status check_regions(std::span<const RegionFileConfig> regions);

/// Whether `range` lies inside its region on whole pages, its addresses do not wrap, and neither its bytes
/// nor its addresses are in `taken` already (each byte of a region is mapped once).
Status check_range(const MappedRange& range, std::span<const RegionFileConfig> regions,
                   std::span<const MappedRange> taken);

/// Reads /proc/PID/maps: kRegionChanged unless the whole range is mapped from that file at that offset, and
/// privately exactly if the region says so. kProcessGone if there is no process.
Status check_mapped(pid_t pid, const MappedRange& range, const FileIdentity& file, bool is_private);

/// Whether every byte of every region is in `ranges`, which check_range has passed.
bool covers_all(std::span<const MappedRange> ranges, std::span<const RegionFileConfig> regions);

/// Cuts one mapping into contiguous stripes of whole pages, about kStripeBytesMin each or more, and deals
/// them to `descriptor_indices` in turn.
inline constexpr uint64_t kStripeBytesMin = uint64_t{64} << 20;
std::vector<MappedRange> stripe(const MappedRange& mapping, uint64_t page_bytes,
                                std::span<const uint32_t> descriptor_indices);

/// Whether the descriptor (of ours) is a userfaultfd.
bool is_userfaultfd(int fd);

}  // namespace vmigrate::pager

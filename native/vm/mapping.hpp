#pragma once

#include <sys/types.h>

#include <cstdint>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "memory/region_config.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

// These functions check what we believe about another process's mappings against the kernel and the files. A
// message or a saved file is never trusted.

struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  bool operator==(const FileIdentity&) const = default;
};

/// kRegionChanged unless the file is a regular file of this user, of exactly the configured length. A
/// symbolic link is none.
Result<FileIdentity> identify(const RegionFileConfig& region);

/// kInvalidArgument unless every path is absolute, every length is a number of whole pages of a sane size,
/// and there are 1 to wire::kPreloadRegionsMax regions.
Status check_regions(std::span<const RegionFileConfig> regions);

/// Whether `range` lies inside its region on whole pages, its addresses do not wrap, and neither its bytes
/// nor its addresses overlap `taken` (each byte of a region is mapped once).
Status check_range(const MappedRange& range, std::span<const RegionFileConfig> regions,
                   std::span<const MappedRange> taken);

/// Reads /proc/PID/maps. kRegionChanged unless the whole range is mapped from that file at that offset, and
/// is a private mapping exactly if the region says so. kProcessGone if there is no such process.
Status check_mapped(pid_t pid, const MappedRange& range, const FileIdentity& file, bool is_private);

/// Whether `ranges` cover every byte of every region. check_range must have passed for each of them.
bool covers_all(std::span<const MappedRange> ranges, std::span<const RegionFileConfig> regions);

/// Cuts one mapping into contiguous stripes of whole pages, each of about kStripeBytesMin or more, and
/// assigns them to `descriptor_indices` in turn.
inline constexpr uint64_t kStripeBytesMin = uint64_t{64} << 20;
std::vector<MappedRange> stripe(const MappedRange& mapping, uint64_t page_bytes,
                                std::span<const uint32_t> descriptor_indices);

/// Whether `fd`, a descriptor of this process, is a userfaultfd.
bool is_userfaultfd(int fd);

}  // namespace vmigrate::pager

#pragma once

#include <cstdint>
#include <string>

namespace vmigrate::pager {

/// A region's file as a VM's process maps it.
struct RegionFileConfig {
  std::string path;
  uint64_t length_bytes = 0;
  uint64_t page_bytes = 0;
  /// Mapped copy-on-write: the guest's writes stay in its process and never reach the file.
  bool is_private = false;
};

/// A region that is filled while it is in use: its file, and the file of its presence map.
struct TargetRegionConfig {
  std::string path;
  std::string presence_path;
  uint64_t length_bytes = 0;
  uint64_t page_bytes = 0;
};

}  // namespace vmigrate::pager

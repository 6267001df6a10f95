#pragma once

#include <cstdint>

#include "image/core.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

/// Maps pages of the image into a clone, on the thread that reads the clone's faults. A clone may be killed
/// at any time; nothing then remains to be done for it.
class CloneMapper {
 public:
  explicit CloneMapper(ImageCore& core) : core_(core) {}

  /// Handles a fault on a present page: maps it together with the present pages that follow it in its
  /// cluster, and wakes.
  void map_present(const VmMemory& clone, uint32_t region_index, PageIndex page);
  /// Handles a fault on a hole: maps zeros to it and to the holes that follow it in its cluster, and wakes.
  void map_zero(const VmMemory& clone, uint32_t region_index, PageIndex page);
  /// Call it when the whole image is here: from then on the kernel serves the clone.
  void let_go(const VmMemory& clone);

 private:
  struct Call {
    uffd::RangeOutcome (*function)(int, HostAddr, uint64_t);
    const char* what;
  };
  void map(const VmMemory& clone, uint32_t region_index, PageIndex page, wire::PageState state,
           const Call& call);
  bool map_piece(int uffd, HostAddr base, uint64_t length_bytes, uint64_t needed_bytes, uint64_t step_bytes,
                 const Call& call);

  ImageCore& core_;
};

}  // namespace vmigrate::pager

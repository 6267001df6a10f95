#pragma once

#include <cstdint>

#include "image/core.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

/// Maps pages of the image into a clone, on the thread that reads its faults. A clone may be killed at any
/// time: then there is nothing left to do for it.
class CloneMapper {
 public:
  explicit CloneMapper(ImageCore& core) : core_(core) {}

  /// The page is present: maps it, with the present ones that follow it in its cluster, and wakes.
  void map_present(const VmMemory& clone, uint32_t region_index, PageIndex page);
  /// The page is a hole: maps zeros to it, and to the holes that follow it in its cluster, and wakes.
  void map_zero(const VmMemory& clone, uint32_t region_index, PageIndex page);
  /// The whole image is here: from now on the kernel serves the clone.
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

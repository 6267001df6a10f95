#pragma once

#include <cstdint>

#include "image/serve/core.hpp"
#include "uffd/uffd.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

/// Unregisters every range of a VM piece by piece and wakes all waiters. A process that has exited needs no
/// release.
Status release_vm(const VmMemory& memory);

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

 private:
  struct Call {
    uffd::RangeOutcome (*function)(int, HostAddr, uint64_t);
    const char* what;
  };
  void map(const VmMemory& clone, uint32_t region_index, PageIndex page, wire::PageState state,
           const Call& call);
  bool allocate_huge_page(uint32_t region_index, PageIndex page);
  bool map_piece(int uffd, HostAddr base, uint64_t length_bytes, uint64_t needed_bytes, uint64_t step_bytes,
                 const Call& call);

  ImageCore& core_;
};

}  // namespace vmigrate::pager

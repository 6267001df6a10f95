#pragma once

#include <cstdint>
#include <span>

#include "base/result.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

struct RegionGeometry {
  uint64_t length_bytes = 0;
  uint64_t page_bytes = 0;
};

/// Checks that a thread which serves this VM's faults can rely on `memory`: every range lies in its region on
/// whole pages and belongs to a descriptor for faults, and the ranges cover every byte of every region. Also
/// makes those descriptors non-blocking: a blocking userfaultfd would stop the thread in a read, and poll on
/// it reports an error.
Status check_vm_fits(const VmMemory& memory, std::span<const RegionGeometry> regions);

}  // namespace vmigrate::pager

#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/page_key.hpp"
#include "base/result.hpp"
#include "memory/fill_state.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

struct RegionGeometry {
  uint64_t length_bytes = 0;
  uint64_t page_bytes = 0;
};

std::vector<RegionGeometry> geometry_of(const FillState& fill);

/// Checks that a thread which serves this VM's faults can rely on `memory`: every range lies in its region on
/// whole pages and belongs to a descriptor for faults, and the ranges cover every byte of every region. Also
/// makes those descriptors non-blocking: a blocking userfaultfd would stop the thread in a read, and poll on
/// it reports an error.
Status check_vm_fits(const VmMemory& memory, std::span<const RegionGeometry> regions);

/// The range that holds the address and belongs to the descriptor; nullptr if none does.
const MappedRange* find_range(const VmMemory& memory, uint32_t descriptor_index, HostAddr address);
/// The page of the region that the address, which lies in the range, shows.
PageKey key_in(const MappedRange& range, HostAddr address, uint64_t page_bytes);

}  // namespace vmigrate::pager

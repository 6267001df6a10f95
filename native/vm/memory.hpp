#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::pager {

/// One contiguous piece of a region as QEMU maps it, and the descriptor that it is registered with, or would
/// be.
struct MappedRange {
  uint32_t region_index = 0;
  uint64_t region_offset_bytes = 0;
  uint64_t length_bytes = 0;
  HostAddr base{};
  uint32_t descriptor_index = 0;  ///< index into VmMemory::descriptors
};

struct UffdDescriptor {
  UniqueFd fd;            ///< our duplicate
  int number_in_vm = -1;  ///< the preload's own descriptor number, for pidfd_getfd after a restart
  wire::PreloadDescriptor kind = wire::PreloadDescriptor::kSync;
};

/// The descriptors and ranges that the preload reported for one QEMU process. Complete when `ranges` cover
/// every byte of every region.
struct VmMemory {
  pid_t pid = -1;
  std::vector<UffdDescriptor> descriptors;
  std::vector<MappedRange> ranges;
};

}  // namespace vmigrate::pager

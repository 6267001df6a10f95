#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::pager {

/// One contiguous piece of a region as QEMU maps it, and the descriptor it is (or would be) registered with.
struct MappedRange {
  uint32_t region_index = 0;
  uint64_t region_offset_bytes = 0;
  uint64_t length_bytes = 0;
  HostAddr base{};
  uint32_t descriptor_index = 0;  ///< into VmMemory::descriptors
};

struct UffdDescriptor {
  UniqueFd fd;            ///< our copy
  int number_in_vm = -1;  ///< the preload's own copy, for pidfd_getfd after a restart
  wire::PreloadDescriptor kind = wire::PreloadDescriptor::kSync;
};

/// What the preload gave us about one QEMU process. Complete when every byte of every region is covered by
/// `ranges`.
struct VmMemory {
  pid_t pid = -1;
  std::vector<UffdDescriptor> descriptors;
  std::vector<MappedRange> ranges;
};

}  // namespace vmigrate::pager

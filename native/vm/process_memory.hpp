#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

/// Reads memory that is in no file: the pages that a VM has written in its copy-on-write mappings. The
/// descriptors here pin the address space that is read, so another process with the same pid is never read.
/// Any thread.
class ProcessMemory {
 public:
  /// Ranges of `memory` must stay valid as long as this object.
  static Result<std::unique_ptr<ProcessMemory>> open(const VmMemory& memory);

  /// Calls `visit` with runs of pages of the region (pages of the kernel, 4 KiB) that are private to the
  /// process, in order, within [offset, offset + length).
  Status each_own_run(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes,
                      const std::function<void(PageRun)>& visit) const;
  /// kProcessGone once the process is being killed. Its memory may go page by page before the process is
  /// gone. If this call succeeds after each_own_run, the runs that each_own_run showed were complete.
  Status whole() const;
  /// Reads what the process would read at that address. kProcessGone if it has ended.
  Status read(uint32_t region_index, uint64_t offset_bytes, std::span<std::byte> out) const;

 private:
  explicit ProcessMemory(const VmMemory& memory) : memory_(memory) {}
  template <typename Visit>
  Status each_part(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes, Visit visit) const;

  const VmMemory& memory_;
  UniqueFd bytes_;
  UniqueFd page_map_;
  UniqueFd status_;
};

}  // namespace vmigrate::pager

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

/// Memory that is in no file: what a VM has written to pages that it maps copy-on-write. Read from its
/// address space, which the descriptors here hold fast: another process with the same pid is never read. Any
/// thread.
class ProcessMemory {
 public:
  /// Ranges of `memory` must stay valid as long as this.
  static Result<std::unique_ptr<ProcessMemory>> open(const VmMemory& memory);

  /// Calls `visit` with runs of pages of the region (of the kernel's, 4 KiB) that the process has for itself,
  /// in order, as far as [offset, offset + length) goes.
  Status each_own_run(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes,
                      const std::function<void(PageRun)>& visit) const;
  /// kProcessGone once the process is being ended: its memory may go page by page before it is gone, so that
  /// what each_own_run has shown before this is all there was.
  Status whole() const;
  /// What the process would read there. kProcessGone if it has ended.
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

#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "uffd/page_scan.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

/// Knows which pages a running VM has written to. The kernel protects its pages and takes the protection of a
/// page away at the first write, without a fault that anybody must answer. So a page counts as unwritten only
/// if the kernel shows that its protection is in place; a page of which it shows nothing, because it has
/// dropped the page's entry (swap), counts as written. One caller at a time.
///
/// Writes count that go through the page tables of the VM's process: those of vCPUs, of QEMU's devices, and
/// of system calls that copy to it. Not seen are a device of the host, another process that maps the file,
/// and what comes into pages that the kernel has pinned before (O_DIRECT: the write to the page table is that
/// of the pin, and the bytes come later). A page that the process has given back (balloon) may count as
/// unwritten. VMs with any of these are not tracked.
class WriteTracker {
 public:
  /// Registers and protects all memory of the VM, which runs; its ranges must be registered with no
  /// userfaultfd. `memory` must outlive the tracker. kUnsupported: the VM or the kernel cannot.
  static Result<std::unique_ptr<WriteTracker>> start(const VmMemory& memory);
  /// Takes the protection away. The VM may run.
  ~WriteTracker();
  /// The same for a tracker of a process that has ended.
  static void release(const VmMemory& memory);
  WriteTracker(const WriteTracker&) = delete;
  WriteTracker& operator=(const WriteTracker&) = delete;

  /// Bytes of a region, in whole pages of the kernel.
  using Visit = std::function<void(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes)>;
  /// Visits all that may have been written since the last call, or since start(), and protects it again. What
  /// is not visited has not been written up to some moment within this call, and a later write is visited by
  /// the next one. Some bytes may be visited twice, and some that nobody has written.
  Status take(const Visit& visit);
  /// The same for a VM that has stopped. It protects nothing, so no call may follow.
  Status take_last(const Visit& visit) const;

 private:
  WriteTracker(const VmMemory& memory, int uffd) : memory_(memory), uffd_(uffd) {}
  Status visit_unprotected(const MappedRange& range, const Visit& visit, bool protect) const;

  const VmMemory& memory_;
  int uffd_;  ///< of `memory_`, asynchronous
  UniqueFd page_map_;
  size_t registered_count_ = 0;  ///< ranges of `memory_`
};

}  // namespace vmigrate::pager

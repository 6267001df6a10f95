#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "image/parent/memory.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

/// Holds the parent's writes back. Without a parent, or once its process is gone, every call does nothing,
/// because no process writes any more.
class ParentGuard {
 public:
  /// Call it before the capture's threads start.
  explicit ParentGuard(ParentMemory& memory);

  /// Registers every range for write-protection. Protects nothing yet.
  Status register_ranges();
  /// Protects everything, kImagePieceBytes at a time. kClosed if the capture is being stopped.
  Status protect_all();
  /// Protects again the clusters that were noted, and clears the notes. While the parent runs, it may write
  /// more meanwhile.
  Status protect_noted();
  /// Fault thread, before seal: allows writes to the cluster around the address, and notes the cluster.
  void let_write(const MappedRange& range, HostAddr address);
  /// Call it when the pages are in the image: allows the parent to write to them, and wakes the threads that
  /// wait to do so.
  void release(uint32_t region_index, PageRun run);
  /// Makes the kernel report every outstanding fault again.
  void wake_all();
  /// After this call nothing is protected or registered, and no thread of the parent waits. Calls that other
  /// threads have under way have no effect.
  void let_go();

 private:
  /// The clusters of one range that were written since they were protected, one bit each.
  struct Notes {
    uint64_t cluster_bytes;
    std::vector<std::atomic<uint64_t>> words;
  };
  int uffd_of(const MappedRange& range) const;
  Status protect(const MappedRange& range, uint64_t offset_bytes, uint64_t length_bytes);
  Status protect_noted_in(size_t range_index);
  void unprotect(const MappedRange& range, uint64_t offset_bytes, uint64_t length_bytes);
  bool is_gone() const { return parent_ == nullptr || is_gone_.load(std::memory_order_relaxed); }

  ParentMemory& memory_;
  ImageCore& core_;
  const VmMemory* const parent_;
  std::vector<Notes> notes_;  ///< one per range
  std::atomic<bool> is_gone_{false};
};

}  // namespace vmigrate::pager

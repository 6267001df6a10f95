#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "image/core.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

/// Holds the parent's writes back. Without a parent, or once its process is gone, every call does nothing:
/// nobody writes any more.
class ParentGuard {
 public:
  /// Before the capture's threads.
  explicit ParentGuard(ImageCore& core);

  /// Registers every range for write-protection. Nothing is protected yet.
  Status register_ranges();
  /// Protects everything, kImagePieceBytes at a time. kClosed if the capture is to end.
  Status protect_all();
  /// Protects again what was noted, and forgets it. While the parent runs, more may be noted meanwhile.
  Status protect_noted();
  /// Fault thread, before seal: the cluster around the address may be written from now on, and is noted.
  void let_write(const MappedRange& range, HostAddr address);
  /// The pages are in the image: the parent may write to them, and whoever waits to do so is woken.
  void release(uint32_t region_index, PageRun run);
  /// Makes every fault that somebody waits with be reported again.
  void wake_all();
  /// Nothing is protected or registered after this, nobody waits. What is under way elsewhere comes to
  /// nothing.
  void let_go();

 private:
  /// The clusters of one range that were written since they were protected, a bit each.
  struct Notes {
    uint64_t cluster_bytes;
    std::vector<std::atomic<uint64_t>> words;
  };
  int uffd_of(const MappedRange& range) const;
  Status protect(const MappedRange& range, uint64_t offset_bytes, uint64_t length_bytes);
  Status protect_noted_in(size_t range_index);
  void unprotect(const MappedRange& range, uint64_t offset_bytes, uint64_t length_bytes);
  bool is_gone() const { return parent_ == nullptr || is_gone_.load(std::memory_order_relaxed); }

  ImageCore& core_;
  const VmMemory* const parent_;
  std::vector<Notes> notes_;  ///< one a range
  std::atomic<bool> is_gone_{false};
};

}  // namespace vmigrate::pager

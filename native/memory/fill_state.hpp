#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "memory/presence_map.hpp"
#include "memory/region.hpp"
#include "memory/region_config.hpp"
#include "memory/touch_order.hpp"

namespace vmigrate::pager {

/// A region that is being filled: its file, and the state of each of its pages.
struct FilledRegion {
  std::unique_ptr<memory::Region> file;
  std::unique_ptr<memory::PresenceMap> presence;
  bool hugetlbfs = false;
  uint64_t page_bytes() const { return file->page_bytes(); }
  uint64_t page_count() const { return file->page_count(); }
  /// Whole pages in so many bytes, at least one.
  uint64_t pages_in(uint64_t bytes) const { return bytes > page_bytes() ? bytes / page_bytes() : 1; }
};

/// The regions of a VM or an image while they are filled, and how far that has come. Who fills them, and who
/// waits for them, is not known here. Thread-safe after open.
class FillState {
 public:
  /// Opens the region files and creates their presence maps; with `resume` it takes the maps of an earlier
  /// process over. `on_done` is called by the thread that adds the last page; it must not block.
  static Result<std::unique_ptr<FillState>> open(std::span<const TargetRegionConfig> configs, bool resume,
                                                 std::function<void()> on_done);

  // --- immutable after open
  std::vector<FilledRegion>& regions() { return regions_; }
  const std::vector<FilledRegion>& regions() const { return regions_; }
  FilledRegion& region(uint32_t index) { return regions_[index]; }
  uint64_t page_count() const { return page_count_; }

  /// Call it when pages have just become present or zero.
  void add_present(uint64_t page_count);
  void add_zero(uint64_t page_count);
  /// Makes pages absent that were written at the source after they had been fetched. The rules are those of
  /// PresenceMap::take_back. Returns how many were not absent.
  uint64_t take_back(uint32_t region_index, PageRun run);
  /// Every page is present or zero.
  bool all_done() const;
  uint64_t pages_present() const { return pages_present_.load(std::memory_order_relaxed); }
  uint64_t pages_zero() const { return pages_zero_.load(std::memory_order_relaxed); }

  /// Checks that the files still hold as much as has been written to them. Another process may have cut or
  /// punched them, and the lost pages would be zeros to a VM that is released. kRegionChanged if so.
  Status check_files() const;

 private:
  explicit FillState(std::function<void()> on_done) : on_done_(std::move(on_done)) {}
  Status open_region(const TargetRegionConfig& config, bool resume);
  void add_done(uint64_t page_count);

  const std::function<void()> on_done_;
  std::vector<FilledRegion> regions_;
  uint64_t page_count_ = 0;
  std::atomic<uint64_t> pages_done_{0};
  std::atomic<uint64_t> pages_present_{0};
  std::atomic<uint64_t> pages_zero_{0};
};

memory::Clusters clusters_of(const FillState& fill);

}  // namespace vmigrate::pager

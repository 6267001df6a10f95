#pragma once

// The memory of a parent at its fork point, as the threads of a capture read it.

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/fault_stats.hpp"
#include "image/serve/core.hpp"
#include "memory/region.hpp"
#include "vm/memory.hpp"
#include "vm/process_memory.hpp"

namespace vmigrate::pager {

struct ParentRegion {
  std::unique_ptr<memory::Region> file;  ///< the file that the parent maps, read-only
  bool is_in_process = false;            ///< the file is an image that the parent maps copy-on-write
  /// One bit for each page that held data when look_for_data was called. Such a page has not become a hole
  /// since.
  std::vector<uint64_t> data;
  bool had_data(uint64_t page) const { return (data[page / 64] >> page % 64 & 1) != 0; }
};

struct ParentCounters {
  std::atomic<uint64_t> copied_bytes{0};
  std::atomic<uint64_t> parent_fault_count{0};
  std::atomic<uint64_t> noted_fault_count{0};
  std::atomic<uint64_t> rearmed_pages{0};
  std::atomic<uint64_t> arm_ns{0};
  std::atomic<uint64_t> protect_ns{0};
  std::atomic<uint64_t> seal_ns{0};
  std::atomic<uint64_t> arm_cpu_ns{0};
  std::atomic<uint64_t> sweep_cpu_ns{0};
};

class ParentMemory {
 public:
  /// Call it before anything is opened.
  static Status check(std::span<const RegionFileConfig> source, std::span<const TargetRegionConfig> image);
  /// Opens the parent's files, which have been checked against those of the image. `parent` may be nullptr:
  /// no process maps them. It must outlive the object.
  static Result<std::unique_ptr<ParentMemory>> open(ImageCore& core, const VmMemory* parent,
                                                    std::span<const RegionFileConfig> source);

  // --- immutable after open, but for look_for_data
  ImageCore& core() { return core_; }
  const VmMemory* vm() const { return vm_; }
  const ParentRegion& region(uint32_t index) const { return regions_[index]; }
  uint64_t page_bytes(uint32_t region_index) const { return core_.region(region_index).page_bytes(); }
  /// Reads the parent's process. Not nullptr if any region is_in_process.
  const ProcessMemory* process() const { return process_.get(); }
  /// Visits the pages that hold data now, of the file or of the process. kProcessGone if the process may have
  /// lost pages meanwhile.
  Status each_data_page(uint32_t region_index, const std::function<void(uint64_t)>& visit) const;
  /// Call it before anything is copied. Records where the files have data, which takes some 10 ms a GiB.
  Status look_for_data();

  // --- threads that are not of the capture, and copy for other hosts
  /// True: the caller may touch the parent until it calls leave(). False: the parent is released, or will be.
  bool enter();
  void leave() {
    // R17 pairs with A17 in bar: every ioctl of the visit before its end.
    visitor_count_.fetch_sub(1, std::memory_order_release);
  }
  /// Lets nobody in any more, and waits until the last one has left.
  void bar();

  // --- between the threads
  FaultStats stats;
  ParentCounters counters;
  /// False only while the sweep runs. It is the sweep's last store (R13).
  std::atomic<bool> sweep_ended{true};

 private:
  ParentMemory(ImageCore& core, const VmMemory* vm) : core_(core), vm_(vm) {}
  Status open_region(const RegionFileConfig& source);

  ImageCore& core_;
  const VmMemory* const vm_;
  std::vector<ParentRegion> regions_;
  std::unique_ptr<ProcessMemory> process_;
  std::atomic<uint32_t> visitor_count_{0};
  std::atomic<bool> is_barred_{false};
};

}  // namespace vmigrate::pager

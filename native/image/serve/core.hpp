#pragma once

// State that the threads of one capture share. The fault thread (faults.hpp) and the sweep (sweep.hpp) meet
// only here; docs/PAGE_STATES.md, "Images", describes the protocol between them.

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/fault_stats.hpp"
#include "base/thread_util.hpp"
#include "image/image.hpp"
#include "memory/presence_map.hpp"
#include "memory/region.hpp"
#include "vm/fit.hpp"
#include "vm/process_memory.hpp"

namespace vmigrate::pager {

struct ImageRegion {
  std::unique_ptr<memory::Region> source;  ///< the file that the parent maps, read-only
  std::unique_ptr<memory::Region> image;
  std::unique_ptr<memory::PresenceMap> presence;
  bool hugetlbfs = false;
  bool is_in_process = false;  ///< `source` is an image that the parent maps copy-on-write
  /// One bit for each page that held data when look_for_data was called. Such a page has not become a hole
  /// since.
  std::vector<uint64_t> data;
  bool had_data(uint64_t page) const { return (data[page / 64] >> page % 64 & 1) != 0; }
  uint64_t page_bytes() const { return image->page_bytes(); }
  /// The pages around `page` that are copied together with it.
  PageRun cluster(PageIndex page) const;
  uint64_t pages_in(uint64_t bytes) const { return bytes > page_bytes() ? bytes / page_bytes() : 1; }
};

struct ImageCounters {
  std::atomic<uint64_t> copied_bytes{0};
  std::atomic<uint64_t> parent_fault_count{0};
  std::atomic<uint64_t> clone_fault_count{0};
  std::atomic<uint64_t> noted_fault_count{0};
  std::atomic<uint64_t> rearmed_pages{0};
  std::atomic<uint64_t> arm_ns{0};
  std::atomic<uint64_t> protect_ns{0};
  std::atomic<uint64_t> seal_ns{0};
  std::atomic<uint64_t> copy_ns{0};
  std::atomic<uint64_t> arm_cpu_ns{0};
  std::atomic<uint64_t> fault_cpu_ns{0};
  std::atomic<uint64_t> sweep_cpu_ns{0};
};

class ImageCore {
 public:
  static Result<std::unique_ptr<ImageCore>> open(ImageConfig config);

  // --- immutable after open
  const VmMemory* parent() const { return config_.parent; }
  std::vector<ImageRegion>& regions() { return regions_; }
  const std::vector<RegionGeometry>& geometry() const { return geometry_; }
  bool resume() const { return config_.resume; }
  /// Reads the parent's process. Not nullptr if any region is_in_process.
  const ProcessMemory* process() const { return process_.get(); }
  uint64_t page_count() const { return page_count_; }

  /// Call it before anything is copied. Records where the parent's files have data, which takes some 10 ms a
  /// GiB.
  Status look_for_data();

  /// Checks that the files still hold as much as has been copied into them. Another process may have cut or
  /// punched them, and the lost pages would be zeros to clones that are released.
  Status check_image_files() const;

  // --- progress
  /// Call it when pages have just become present or zero. Wakes both threads if they were the last pages.
  void add_present(uint64_t page_count);
  void add_zero(uint64_t page_count);
  bool all_done() const;
  uint64_t pages_present() const { return pages_present_.load(std::memory_order_relaxed); }
  uint64_t pages_zero() const { return pages_zero_.load(std::memory_order_relaxed); }

  // --- state
  ImageState state() const {
    // A11 pairs with R11 in every change: what led to the state is visible to a thread that sees the state.
    return state_.load(std::memory_order_acquire);
  }
  /// Returns false and changes nothing if the state is not `from`.
  bool advance(ImageState from, ImageState to);
  /// kArming, kArmed or kCopying -> kFailed. The first error is kept.
  void fail(const Error& error);
  std::optional<Error> failure() const;
  void complete();
  /// How the threads must end if they are stopped early: kLeave keeps the parent registered, kLetGo releases
  /// it.
  enum class Stop : uint8_t { kNone = 0, kLeave, kLetGo };
  void request_stop(Stop stop);
  /// kFailed counts as kLetGo.
  Stop must_stop() const;
  /// Call it after the threads have ended.
  void finish_close();
  void begin_copying();

  // --- between the threads
  FaultStats parent_stats;
  FaultStats clone_stats;
  ImageCounters counters;
  WakeEvent fault_wake;
  /// Number of faults that wait for a page which the sweep has claimed (F11, F12).
  std::atomic<size_t> wait_count{0};
  /// False only while the sweep runs. It is the sweep's last store (R13).
  std::atomic<bool> sweep_ended{true};

 private:
  ImageCore() = default;
  Status open_region(const RegionFileConfig& source, const TargetRegionConfig& image);
  void add_done(uint64_t page_count);

  ImageConfig config_;
  std::unique_ptr<ProcessMemory> process_;
  std::vector<ImageRegion> regions_;
  std::vector<RegionGeometry> geometry_;
  uint64_t page_count_ = 0;
  uint64_t copying_since_ns_ = 0;  ///< written before any thread copies
  std::atomic<uint64_t> pages_done_{0};
  std::atomic<uint64_t> pages_present_{0};
  std::atomic<uint64_t> pages_zero_{0};

  mutable std::mutex mutex_;  // guards state changes and failure_
  std::atomic<ImageState> state_{ImageState::kIdle};
  std::atomic<Stop> stop_{Stop::kNone};
  std::optional<Error> failure_;
};

}  // namespace vmigrate::pager

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "memory/region.hpp"
#include "transport/transport.hpp"
#include "vm/process_memory.hpp"

namespace vmigrate::pager {

/// One region of a clone that is stopped to leave this host. The pages that the clone has written are in its
/// process; everything else is in the file of its image. This class copies the clone's own pages to a file of
/// their own (docs/PAGE_STATES.md, "A clone that leaves"). After that the process is not needed any more.
///
///   unknown ── look ──► known ── keep ──► kept
class CloneRegion final : public transport::MemoryReader {
 public:
  /// `image` and `process` must outlive the object. With `resume` the pages kept by an earlier daemon are
  /// taken over; otherwise a file at `own_path` is removed. `process` may be nullptr if all pages are kept;
  /// kProcessGone if they are not.
  static Result<std::unique_ptr<CloneRegion>> open(const memory::Region& image, uint32_t region_index,
                                                   const ProcessMemory* process, std::string own_path,
                                                   bool resume);
  ~CloneRegion() override = default;

  // One thread calls these, in this order. The process is stopped from before `look` on.
  Status look();
  /// Stops early and keeps nothing if `stop` is set. If it fails, the process is still read.
  Status keep(const std::atomic<bool>& stop);
  /// Pages of the region that hold data, either the clone's own or the image's. Call it after `look`.
  Status each_used_run(const std::function<void(PageRun)>& visit) const;
  /// Number of own pages, of 4 KiB.
  uint64_t own_pages() const { return own_pages_.load(std::memory_order_relaxed); }
  uint64_t kept_pages() const { return kept_pages_.load(std::memory_order_relaxed); }

  // Any thread.
  Status read(uint64_t offset_bytes, std::span<std::byte> out) const override;
  /// The process ended before its pages were kept, so the pages are lost.
  bool lost() const {
    // Relaxed: the stage is final before the end of the process can make a difference.
    return lost_.load(std::memory_order_relaxed) && stage_.load(std::memory_order_relaxed) != Stage::kKept;
  }

 private:
  enum class Stage : uint8_t { kUnknown = 1, kKnown, kKept };
  CloneRegion(const memory::Region& image, uint32_t region_index, const ProcessMemory* process,
              std::string own_path);
  Status take_over();
  Status copy_own(int fd, const std::atomic<bool>& stop);
  bool is_own(uint64_t page) const { return (own_[page / 64] >> page % 64 & 1) != 0; }
  uint64_t bits_bytes() const { return own_.size() * sizeof(uint64_t); }
  /// Visits each run of own pages in [offset, offset + length).
  template <typename Visit>
  Status each_own_run(Stage stage, uint64_t offset_bytes, uint64_t length_bytes, Visit visit) const;
  Status read_in(Stage stage, uint64_t offset_bytes, std::span<std::byte> out) const;
  Status read_own(Stage stage, uint64_t offset_bytes, std::span<std::byte> out) const;

  const memory::Region& image_;
  const uint32_t region_index_;
  const ProcessMemory* const process_;
  const std::string own_path_;
  std::vector<uint64_t> own_;  ///< one bit per page of 4 KiB; final from kKnown on
  UniqueFd own_fd_;            ///< from kKept on: the pages at their offsets in the region, then `own_`
  std::atomic<Stage> stage_{Stage::kUnknown};
  std::atomic<uint64_t> own_pages_{0};
  std::atomic<uint64_t> kept_pages_{0};
  mutable std::atomic<bool> lost_{false};
};

}  // namespace vmigrate::pager

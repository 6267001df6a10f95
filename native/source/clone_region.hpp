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

/// One region of a clone that stands still to leave this host. The pages that it has written are in its
/// process; everything else is in the file of its image. Its own pages are copied to a file beside
/// (docs/PAGE_STATES.md, "A clone that leaves"), after which the process is not needed any more.
///
///   unknown ── look ──► known ── keep ──► kept
class CloneRegion final : public transport::MemoryReader {
 public:
  /// `image` and `process` outlive it. `resume`: pages kept by an earlier daemon are taken over; else what
  /// lies at `own_path` goes. `process` may be nullptr where everything is kept; kProcessGone if it is not.
  static Result<std::unique_ptr<CloneRegion>> open(const memory::Region& image, uint32_t region_index,
                                                   const ProcessMemory* process, std::string own_path,
                                                   bool resume);
  ~CloneRegion() override = default;

  // One thread, in this order; the process stands still from before `look` on.
  Status look();
  /// Stops early, and keeps nothing, when `stop` is set. The process is read on if it fails.
  Status keep(const std::atomic<bool>& stop);
  /// Pages of the region with data: of its own, or of the image. After `look`.
  Status each_used_run(const std::function<void(PageRun)>& visit) const;
  /// Of 4 KiB.
  uint64_t own_pages() const { return own_pages_.load(std::memory_order_relaxed); }
  uint64_t kept_pages() const { return kept_pages_.load(std::memory_order_relaxed); }

  // Any thread.
  Status read(uint64_t offset_bytes, std::span<std::byte> out) const override;
  /// The process has ended before its pages were kept: they are nowhere any more.
  bool lost() const {
    // Relaxed: the stage is final when a process that has ended can make a difference.
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
  /// Each run of own pages in [offset, offset + length).
  template <typename Visit>
  Status each_own_run(Stage stage, uint64_t offset_bytes, uint64_t length_bytes, Visit visit) const;
  Status read_in(Stage stage, uint64_t offset_bytes, std::span<std::byte> out) const;
  Status read_own(Stage stage, uint64_t offset_bytes, std::span<std::byte> out) const;

  const memory::Region& image_;
  const uint32_t region_index_;
  const ProcessMemory* const process_;
  const std::string own_path_;
  std::vector<uint64_t> own_;  ///< a bit a page of 4 KiB; final from kKnown on
  UniqueFd own_fd_;            ///< from kKept on: the pages where the region has them, then `own_`
  std::atomic<Stage> stage_{Stage::kUnknown};
  std::atomic<uint64_t> own_pages_{0};
  std::atomic<uint64_t> kept_pages_{0};
  mutable std::atomic<bool> lost_{false};
};

}  // namespace vmigrate::pager

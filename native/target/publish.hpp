#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "fetch/page_sink.hpp"
#include "target/core.hpp"
#include "target/limits.hpp"

namespace vmigrate::pager {

/// Makes pages visible to the VM and wakes their waiters. Each thread has its own Publisher; the two may work
/// on the same page at once (docs/PAGE_STATES.md, "No wake is lost").
class Publisher final : public PageSink {
 public:
  explicit Publisher(TargetCore& core) : core_(core) {}
  /// Call it before the first publish.
  Status open();

  /// Tags the pages if the session wants that, changes the state, then calls CONTINUE, then wakes and
  /// accounts. If a vCPU waits for one of the pages, that page goes first.
  void publish(uint32_t region_index, PageRun run) override;
  bool is_awaited(uint32_t region_index, PageRun run) const override;
  /// Each fetch may defer two runs (publish), so two free places are needed for each.
  bool has_room(size_t fetch_count) const override { return retry_count_ + 2 * fetch_count <= kRetriesMax; }
  bool has_deferred() const override { return retry_count_ != 0; }
  /// Handles a fault on a present page: maps the page. If the VM itself has discarded the page's bytes since,
  /// the page becomes zeros.
  void serve_present(uint32_t region_index, PageIndex page);
  /// Handles a fault on a page that is a hole at the source, together with the zero pages that follow it.
  void serve_zero(uint32_t region_index, PageIndex page);
  /// Retries the runs whose CONTINUE returned EAGAIN. True if any of them made progress.
  bool retry() override;
  size_t retry_count() const { return retry_count_; }
  /// Maps pages that were fetched ahead, from the first one on, so that the VM need not fault on them.
  bool show_some() override;

 private:
  struct Retry {
    uint32_t region_index;
    PageRun run;
  };
  /// One piece of a region in the VM's address space.
  struct Piece {
    int uffd;
    HostAddr base;
    uint64_t length_bytes;
  };
  template <typename Visit>
  bool each_piece(uint32_t region_index, PageRun run, Visit visit);
  /// Handles a page that is present but has no bytes because the VM has discarded it. kWake: the waiter
  /// faults again, and that fault is served with kZero.
  enum class OnHole : uint8_t { kWake = 1, kZero };
  bool continue_run(uint32_t region_index, PageRun run, OnHole on_hole);
  bool allocate_huge_page(const FilledRegion& region, uint64_t offset_bytes);
  bool zero_piece(uint32_t region_index, uint64_t offset_bytes, const Piece& piece, uint64_t needed_bytes);
  void show_after(uint32_t region_index, PageIndex page);
  void defer(uint32_t region_index, PageRun run);
  void wake(const Piece& piece);
  void account(uint32_t region_index, PageRun run);

  TargetCore& core_;
  std::unique_ptr<ArrivalTags::Writer> tags_;
  std::array<Retry, kRetriesMax> retries_;
  size_t retry_count_ = 0;
  // The next page that show_some looks at.
  uint32_t shown_region_ = 0;
  uint64_t shown_page_ = 0;
};

}  // namespace vmigrate::pager

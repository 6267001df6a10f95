#pragma once

// State that the threads of one target session share. The demand thread (demand.hpp) and the bulk thread
// (fetch/bulk.hpp) meet only here and in the FetchCore; docs/PAGE_STATES.md describes the protocol between
// them.

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/fault_stats.hpp"
#include "base/page_key.hpp"
#include "base/session_state.hpp"
#include "base/thread_util.hpp"
#include "fetch/core.hpp"
#include "target/arrival_tags.hpp"
#include "target/target.hpp"
#include "target/wait_table.hpp"

namespace vmigrate::pager {

struct TargetCounters {
  std::atomic<uint64_t> fault_count{0};
  std::atomic<uint64_t> fault_on_claimed_count{0};
  std::atomic<uint64_t> completed_ns{0};
  std::atomic<uint64_t> demand_cpu_ns{0};
  /// What had been fetched when the session began to serve the VM. Until then everything counts.
  std::atomic<uint64_t> ahead_bytes{UINT64_MAX};
};

class TargetCore final : private FetchOwner {
 public:
  static Result<std::unique_ptr<TargetCore>> open(const VmMemory& memory,
                                                  std::span<const TargetRegionConfig> configs,
                                                  const TargetOptions& options, bool resume,
                                                  std::function<void()> on_edge);

  // --- immutable after open
  const VmMemory& vm() const { return *vm_; }
  FillState& fill() { return *fill_; }
  FilledRegion& region(uint32_t index) { return fill_->region(index); }
  /// The VM's mappings of a region, by region offset.
  const std::vector<MappedRange>& ranges(uint32_t region_index) const { return ranges_[region_index]; }
  FetchCore& fetch() { return *fetch_; }
  /// nullptr: pages are not tagged.
  ArrivalTags* tags() { return tags_.get(); }
  bool resume() const { return resume_; }
  /// This session, or the one that it takes over.
  bool has_fetched_ahead() const { return has_fetched_ahead_.load(std::memory_order_relaxed); }
  /// The region and page of the mapped byte; nullopt if it lies in none of the VM's ranges.
  std::optional<PageKey> locate(uint32_t descriptor_index, HostAddr address) const;

  // --- session state
  TargetState state() const;
  bool must_end() const override;
  std::optional<Error> failure() const { return state_.failure(); }
  /// kAhead, kFilling or kDisconnected -> kFailed. The first error is kept.
  void fail(const Error& error) override;
  /// Serving thread: call it after every range is unregistered.
  void complete(uint64_t at_ns);
  Status attach(SourceEndpoints endpoints);
  /// kIdle -> kAhead, and back when every page is here or nothing is in flight.
  Status begin_ahead();
  void end_ahead(bool is_quiet);
  Status begin();
  /// Asks both threads to end.
  void request_stop();
  /// Call it after the threads have ended. The state becomes kClosed unless the session ended otherwise
  /// before.
  void finish_close();
  void notify() { on_edge_(); }

  // --- between the threads
  WaitTable waits;
  FaultStats stats;
  TargetCounters counters;
  WakeEvent demand_wake;
  /// The demand thread has stopped reading faults until a wait is resolved (F3, F4).
  std::atomic<bool> reading_paused{false};

 private:
  TargetCore() = default;
  void on_connection() override { on_edge_(); }
  bool may_be_zero(uint32_t, PageIndex) const override { return may_be_zero_; }
  Error wrong_state(const char* what) const;

  const VmMemory* vm_ = nullptr;
  std::unique_ptr<FillState> fill_;
  std::vector<std::vector<MappedRange>> ranges_;
  std::unique_ptr<FetchCore> fetch_;
  std::unique_ptr<ArrivalTags> tags_;
  bool resume_ = false;
  bool may_be_zero_ = true;
  /// Set before the threads that serve the VM exist.
  std::atomic<bool> has_fetched_ahead_{false};
  std::function<void()> on_edge_;
  uint64_t start_ns_ = 0;  ///< written by begin, before the threads exist

  /// Never kDisconnected: whether a connection is lost is known to the FetchCore.
  SessionState<TargetState> state_{TargetState::kIdle};
  std::atomic<bool> stop_{false};
};

}  // namespace vmigrate::pager

#pragma once

// State that the threads of one target session share. The demand thread (demand.hpp) and the bulk thread
// (bulk.hpp) meet only here; docs/PAGE_STATES.md describes the protocol between them.

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/fault_stats.hpp"
#include "base/page_key.hpp"
#include "base/thread_util.hpp"
#include "memory/presence_map.hpp"
#include "memory/region.hpp"
#include "target/fault_ring.hpp"
#include "target/target.hpp"
#include "target/wait_table.hpp"

namespace vmigrate::pager {

struct TargetRegion {
  std::unique_ptr<memory::Region> region;
  std::unique_ptr<memory::PresenceMap> presence;
  std::vector<MappedRange> ranges;  ///< the VM's mappings of this region, by region offset
  bool hugetlbfs = false;
};

/// One thread's connection to the source. The thread owns it once it has taken it.
struct Link {
  std::unique_ptr<transport::Endpoint> endpoint;
  std::vector<SourceRegionKeys> keys;
  std::vector<transport::LocalId> local;  ///< one per region
  transport::LocalId map_buffer{};        ///< TargetCore::map_buffer; demand uses it before the threads run
  uint64_t epoch = 0;                     ///< number of the connect() that made it; 0: none yet
};

enum class Lane { kDemand, kBulk };

struct TargetCounters {
  std::atomic<uint64_t> demand_bytes{0};
  std::atomic<uint64_t> prefetch_bytes{0};
  std::atomic<uint64_t> fault_count{0};
  std::atomic<uint64_t> fault_on_claimed_count{0};
  std::atomic<uint64_t> reconnect_count{0};
  std::atomic<uint64_t> completed_ns{0};
  std::atomic<uint64_t> demand_cpu_ns{0};
  std::atomic<uint64_t> bulk_cpu_ns{0};
};

class TargetCore {
 public:
  static Result<std::unique_ptr<TargetCore>> open(const VmMemory& memory,
                                                  std::span<const TargetRegionConfig> configs,
                                                  const TargetOptions& options, bool resume,
                                                  std::function<void()> on_edge);

  // --- immutable after open
  const VmMemory& vm() const { return *vm_; }
  std::vector<TargetRegion>& regions() { return regions_; }
  const TargetOptions& options() const { return options_; }
  bool resume() const { return resume_; }
  uint64_t page_count() const { return page_count_; }
  /// The region and page of the mapped byte; nullopt if it lies in none of the VM's ranges.
  std::optional<PageKey> locate(uint32_t descriptor_index, HostAddr address) const;

  // --- progress
  /// Call it when pages have just become present or zero. Wakes both threads if they were the last pages.
  void add_present(uint64_t page_count);
  void add_zero(uint64_t page_count);
  bool all_done() const;
  uint64_t pages_present() const { return pages_present_.load(std::memory_order_relaxed); }
  uint64_t pages_zero() const { return pages_zero_.load(std::memory_order_relaxed); }

  // --- session state; rare changes take a mutex
  TargetState state() const {
    // A4 pairs with R4 in every change: what led to the state is visible to a thread that sees the state.
    return state_.load(std::memory_order_acquire);
  }
  /// The threads keep running while this is false.
  bool must_end() const;
  std::optional<Error> failure() const;
  /// kFilling or kDisconnected -> kFailed. The first error is kept.
  void fail(const Error& error);
  /// kFilling -> kDisconnected, unless there is a newer connection already or nothing is left to fetch.
  void report_disconnected(uint64_t epoch);
  /// Serving thread: call it after every range is unregistered.
  void complete(uint64_t at_ns);
  Status attach(SourceEndpoints endpoints);
  Status begin();
  /// Asks both threads to end.
  void request_stop();
  /// Call it after the threads have ended. Drops connections that no thread has taken. The state becomes
  /// kClosed unless the session ended otherwise before.
  void finish_close();

  uint64_t link_epoch() const {
    // A5 pairs with R5 in attach: the link is in place before its number.
    return link_epoch_.load(std::memory_order_acquire);
  }
  /// Returns the newest link of a lane to the thread that owns the lane. The thread's old link may still be
  /// open.
  Link take_link(Lane lane);
  void notify() { on_edge_(); }

  // --- between the threads
  WaitTable waits;
  FaultRing recent_faults;
  FaultStats stats;
  TargetCounters counters;
  WakeEvent demand_wake;
  WakeEvent bulk_wake;
  /// Time of the latest fault, a hint for prefetch. Relaxed.
  std::atomic<uint64_t> last_fault_ns{0};
  /// The demand thread has stopped reading faults until a wait is resolved (F3, F4).
  std::atomic<bool> reading_paused{false};
  /// The bulk thread sets this last; from then on the demand thread is alone.
  std::atomic<bool> bulk_ended{false};
  uint64_t start_ns = 0;  ///< written by begin, before the threads exist
  /// Buffer that parts of a data map are read into, and the probe of a connection.
  std::vector<std::byte> map_buffer;

 private:
  TargetCore() = default;
  Status open_regions(std::span<const TargetRegionConfig> configs);
  void wake_threads();
  void notice_done(uint64_t done_before, uint64_t added);

  const VmMemory* vm_ = nullptr;
  std::vector<TargetRegion> regions_;
  TargetOptions options_;
  bool resume_ = false;
  std::function<void()> on_edge_;
  uint64_t page_count_ = 0;
  std::atomic<uint64_t> pages_done_{0};
  std::atomic<uint64_t> pages_present_{0};
  std::atomic<uint64_t> pages_zero_{0};

  mutable std::mutex mutex_;  // guards state changes, failure_, pending_
  std::atomic<TargetState> state_{TargetState::kIdle};
  std::atomic<bool> stop_{false};
  std::optional<Error> failure_;
  Link pending_demand_;
  Link pending_bulk_;
  std::atomic<uint64_t> link_epoch_{0};
};

}  // namespace vmigrate::pager

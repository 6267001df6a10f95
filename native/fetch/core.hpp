#pragma once

// State that the two lanes of a fetch share. The lane for demand belongs to the thread that reads faults, and
// the lane for bulk to a thread of its own (bulk.hpp); they meet only here. docs/PAGE_STATES.md describes the
// protocol between them.

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/thread_util.hpp"
#include "fetch/bandwidth.hpp"
#include "fetch/endpoints.hpp"
#include "fetch/fault_ring.hpp"
#include "fetch/nearer_feeds.hpp"
#include "memory/fill_state.hpp"

namespace vmigrate::pager {

/// One lane's connection to the holder of the pages. The lane's thread owns it once it has taken it.
struct Link {
  std::unique_ptr<transport::Endpoint> endpoint;
  std::vector<SourceRegionKeys> keys;
  std::vector<transport::LocalId> local;  ///< one per region
  transport::LocalId map_buffer{};        ///< FetchCore::map_buffer; for bulk
  uint64_t epoch = 0;                     ///< number of the attach() that made it; 0: none yet
};

enum class Lane { kDemand, kBulk };

/// Makes the regions known to the link's endpoint, in order. May take long for a device. Call it before the
/// first operation.
Status register_regions(Link& link, const FillState& fill);

/// A holder has no messages for us. One that sends some would keep the descriptor readable, and our thread
/// awake.
void drop_messages(transport::Endpoint& endpoint);

/// The session that a fetch is a part of. Any thread may call it.
class FetchOwner {
 public:
  virtual ~FetchOwner() = default;
  /// Ends the session with an error. The first error counts.
  virtual void fail(const Error& error) = 0;
  /// The lanes keep running while this is false.
  virtual bool must_end() const = 0;
  /// FetchCore::is_lost has changed.
  virtual void on_connection() = 0;
  /// The source says that the page is a hole. False: it is known to have data, and must be read.
  virtual bool may_be_zero(uint32_t /*region_index*/, PageIndex /*page*/) const { return true; }
  /// Some pages of the run have been marked as zeros and are not counted yet. False: one must not be, and the
  /// session has failed.
  virtual bool zeros_are_right(uint32_t /*region_index*/, PageRun /*run*/) { return true; }
};

struct FetchCounters {
  std::atomic<uint64_t> demand_bytes{0};
  std::atomic<uint64_t> prefetch_bytes{0};
  std::atomic<uint64_t> ordered_bytes{0};  ///< asked for in the order of set_order
  std::atomic<uint64_t> near_bytes{0};
  std::atomic<uint64_t> absent_answers{0};
  std::atomic<uint64_t> reconnect_count{0};
  std::atomic<uint64_t> refused_pages{0};       ///< of the root
  std::atomic<uint64_t> near_refused_pages{0};  ///< of near holders, which are given up one by one
  std::atomic<uint64_t> bulk_cpu_ns{0};
  std::atomic<uint64_t> near_cpu_ns{0};
};

class FetchCore {
 public:
  /// All arguments must outlive it. `demand_wake` wakes the thread of the demand lane.
  FetchCore(FillState& fill, const FetchOptions& options, const WakeEvent& demand_wake, FetchOwner& owner);
  /// For open: kInvalidArgument, or what the system lacks.
  Status check() const;

  FillState& fill() { return fill_; }
  const FetchOptions& options() const { return options_; }
  FetchOwner& owner() { return owner_; }

  // --- connections
  /// Gives both lanes new connections. Allowed before begin(), and when the last connections are lost;
  /// otherwise kInvalidArgument, or kClosed after end(). Before begin() each connection is tried first
  /// (probe_timeout).
  Status attach(SourceEndpoints endpoints);
  /// The lanes will run.
  void begin();
  /// The session has ended, whatever the reason: drops connections that no lane has taken, and refuses
  /// others.
  void end();
  uint64_t link_epoch() const {
    // A5 pairs with R5 in attach: the link is in place before its number.
    return link_epoch_.load(std::memory_order_acquire);
  }
  /// Returns the newest link of a lane to the thread that owns the lane. The thread's old link may still be
  /// open.
  Link take_link(Lane lane);
  /// The connections of the newest attach() do not work any more; attach() is allowed. Relaxed: a link is
  /// handed over by its number alone.
  bool is_lost() const { return is_lost_.load(std::memory_order_relaxed); }
  /// A lane may use its link. After an error nothing may be asked for any more: what a peer has said may be
  /// wrong.
  bool may_ask() const { return !is_lost() && !owner_.must_end(); }
  /// A lane has lost its link. Does nothing if there is a newer link, or if nothing is left to fetch.
  void report_lost(uint64_t epoch);

  void wake_demand() const { demand_wake_.signal(); }
  void wake_bulk() const {
    bulk_wake.signal();
    near_wake.signal();
  }
  void wake_lanes() const {
    wake_demand();
    wake_bulk();
  }

  // --- between the lanes
  FaultRing recent_faults;
  FaultRing near_recent_faults;  ///< the same faults, for the thread that reads from near holders
  /// The same faults for a multicast, which asks its sender for the pages around them.
  FaultRing wanted_faults;
  NearerFeeds nearer;
  Bandwidth bandwidth;
  FetchCounters counters;
  WakeEvent bulk_wake;
  WakeEvent near_wake;
  /// All holes of the regions below this number are marked: their absent pages are data, and never become
  /// zero. Bulk thread.
  void set_maps_known(uint32_t region_count) {
    // R21 pairs with A21 in maps_known: the marks before their number.
    maps_known_.store(region_count, std::memory_order_release);
    near_wake.signal();
  }
  uint32_t maps_known() const {
    // A21 pairs with R21 in set_maps_known.
    return maps_known_.load(std::memory_order_acquire);
  }
  /// Pages that no fault asks for are fetched as well. While it is false bulk only looks for holes. Wake the
  /// lanes after a change.
  std::atomic<bool> fetches_all{true};
  /// A lane has given a claim up and goes on: bulk looks for absent pages from the beginning.
  void note_unclaimed() {
    // R19 pairs with A19 in unclaimed_count: the state of the page before the count.
    unclaimed_count_.fetch_add(1, std::memory_order_release);
    wake_bulk();
  }
  uint64_t unclaimed_count() const {
    // A19 pairs with R19 in note_unclaimed.
    return unclaimed_count_.load(std::memory_order_acquire);
  }
  /// Bulk fetches these clusters first (memory/touch_order.hpp), whatever it has fetched before.
  void set_order(std::vector<uint32_t> order);
  /// The order that was set since the last call, if any. Bulk thread.
  std::optional<memory::OrderedPages> take_order();
  /// Time of the latest fault, a hint for prefetch. Relaxed.
  std::atomic<uint64_t> last_fault_ns{0};
  /// The bulk thread sets this last; from then on the demand lane is alone (R8).
  std::atomic<bool> bulk_ended{false};
  /// The same for the thread that reads from near holders (R22).
  std::atomic<bool> near_ended{false};
  /// Buffer that parts of a data map are read into.
  std::vector<std::byte> map_buffer;

 private:
  FillState& fill_;
  FetchOptions options_;  ///< without the order
  const WakeEvent& demand_wake_;
  FetchOwner& owner_;
  /// What a probe reads, and nobody looks at. Not map_buffer: the lanes may begin during a probe.
  std::vector<std::byte> probe_buffer_;

  std::atomic<uint64_t> unclaimed_count_{0};
  std::atomic<uint32_t> maps_known_{0};

  Status check_may_attach() const;  ///< with mutex_

  std::mutex mutex_;  // guards the pending links and the two flags, and changes of the two atomics below
  bool is_begun_ = false;
  bool is_ended_ = false;
  Link pending_demand_;
  Link pending_bulk_;
  std::vector<uint32_t> pending_order_;  // guarded by mutex_
  /// Relaxed: the order is handed over by mutex_.
  std::atomic<bool> has_pending_order_{false};
  std::atomic<uint64_t> link_epoch_{0};
  std::atomic<bool> is_lost_{false};
};

}  // namespace vmigrate::pager

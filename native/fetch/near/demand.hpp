#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/unique_fd.hpp"
#include "fetch/demand_lane.hpp"
#include "fetch/near/demand_lane.hpp"
#include "fetch/near/holders.hpp"
#include "fetch/near/sink.hpp"

namespace vmigrate::pager {

/// Pages that clones wait for are asked of a near holder first: of the nearest level that has a connected
/// one, and there of one that the page's place chooses. A claim that it cannot serve, because it has not got
/// the page or is lost, moves to the next level, and at last to the root's lane. So a claim is in one slot of
/// one lane at any time. Part of the thread that serves the clones.
class NearDemand {
 public:
  /// All arguments must outlive it.
  NearDemand(FetchCore& core, NearHolders& holders, NearSink& sink, DemandLane& root)
      : core_(core), holders_(holders), sink_(sink), root_(root) {}
  Status open();
  /// Readable when step may have something to do.
  int event_fd() const { return epoll_.get(); }

  /// Claims in the lanes of all near holders. The root's lane must have room for all of them.
  size_t used_count() const;
  /// Takes over the claim of a page. False: no near holder can be asked, and the claim is the caller's.
  bool start(uint32_t region_index, PageIndex page);
  /// Takes over new connections, and deals with what has arrived.
  void step();
  /// How long the thread may sleep before the next step, in ms; -1: until it is woken.
  int timeout_ms() const;
  /// The thread ends. Claims stay claimed.
  void close() { lanes_.clear(); }

 private:
  void take_changes();
  void drop_lanes();
  bool poll(NearDemandLane& lane);
  NearDemandLane* choose(uint32_t region_index, PageIndex page, uint32_t level_min) const;
  /// Takes over a claim that holders of lower levels could not serve.
  void move(uint32_t region_index, PageIndex page, uint32_t level_min);

  FetchCore& core_;
  NearHolders& holders_;
  NearSink& sink_;
  DemandLane& root_;
  UniqueFd epoll_;
  std::vector<std::unique_ptr<NearDemandLane>> lanes_;  ///< nearest first
  uint64_t epoch_ = 0;
  uint64_t next_number_ = 0;
};

}  // namespace vmigrate::pager

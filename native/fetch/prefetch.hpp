#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "fetch/core.hpp"
#include "fetch/data_map_reader.hpp"
#include "fetch/limits.hpp"
#include "fetch/service_rate.hpp"
#include "fetch/transfer_size.hpp"

namespace vmigrate::pager {

/// Decides what bulk fetches next: pages ahead of recent faults, then those that earlier clones have touched,
/// in the order in which they did, then upwards from the lowest absent page. It chooses small pieces while
/// vCPUs fault, so that a fault on a page that bulk has claimed waits for little else. Bulk thread; posts
/// nothing.
class Prefetch {
 public:
  Prefetch(FetchCore& core, const DataMapReader& maps, const ServiceRate& rate);

  struct Claimed {
    uint32_t region_index;
    PageRun run;
  };
  /// Claims a run and returns it; nullopt if no page that is known to be data is absent.
  std::optional<Claimed> claim_next(uint64_t at_ns);
  /// Pages below the sweep have become absent. It comes to them when it has been through the others.
  void sweep_again() { sweeps_again_ = true; }
  uint64_t in_flight_bytes_max(uint64_t at_ns) const { return size_.in_flight_bytes_max(at_ns); }

 private:
  /// A place where the guest faulted, and how far to fetch ahead from there.
  struct Stream {
    uint32_t region_index = 0;
    uint64_t next_page = 0;
    uint64_t pages_left = 0;
    uint64_t window_bytes = 0;
    uint64_t used_at = 0;  // 0: free
  };
  void follow(PageKey fault);
  std::optional<Claimed> claim_from_streams(uint64_t chunk_bytes);
  std::optional<Claimed> claim_from_order(uint64_t chunk_bytes);
  std::optional<Claimed> claim_from_sweep(uint64_t chunk_bytes);
  uint64_t page_bytes(uint32_t region_index) const { return core_.fill().region(region_index).page_bytes(); }

  FetchCore& core_;
  const DataMapReader& maps_;
  TransferSize size_;
  std::array<Stream, kStreamsMax> streams_{};
  uint64_t stream_uses_ = 0;
  memory::OrderedPages order_;
  std::optional<memory::Clusters::Place> ordered_;  ///< what is left of the last clusters of the order
  std::vector<uint64_t> sweep_page_;  // one per region: no page below it is absent, unless a claim was given
                                      // up or a page taken back since
  bool sweeps_again_ = false;
  uint64_t unclaimed_count_ = 0;  // of the last look at FetchCore::unclaimed_count
};

}  // namespace vmigrate::pager

#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "memory/region.hpp"
#include "source/data_map.hpp"
#include "source/write_tracker.hpp"
#include "transport/transport.hpp"

namespace vmigrate::pager {

/// What the source of a running VM tells its target after each round: which pages were written since. A map
/// for each region, which the target reads when it has been told the number of the round. Between two rounds
/// the maps do not change. One caller at a time.
class DirtyMaps {
 public:
  /// Tracking begins. `memory` must outlive the maps.
  static Result<std::unique_ptr<DirtyMaps>> start(const VmMemory& memory);

  /// Adds the map of the next region. Before the first note().
  Status add(const memory::Region& region);
  const DataMap& map(uint32_t region_index) const { return *regions_[region_index].map; }

  struct Round {
    uint32_t number = 0;  ///< from 1
    uint64_t page_count = 0;
    /// Of them, how many the round before has named, too. Not counted in the last round, when the VM waits.
    uint64_t again_count = 0;
  };
  /// Publishes the pages that were written since the last call, or since start(). Each of them must be taken
  /// back by the target: no later round names them. `is_last`: the VM has stopped; no call may follow.
  Result<Round> note(bool is_last);
  /// Whether a page was written after the last round, which does not name it: by QEMU itself, whose main loop
  /// runs on while its VM stands still. Changes nothing.
  Result<bool> has_changed_since_last() const;

 private:
  struct RegionMap {
    uint64_t page_bytes;
    std::unique_ptr<DataMap> map;
    std::vector<std::byte> bits_before;  ///< of the round before
  };
  DirtyMaps() = default;
  static PageRun pages_in(const RegionMap& region, uint64_t offset_bytes, uint64_t length_bytes);

  std::unique_ptr<WriteTracker> tracker_;
  std::vector<RegionMap> regions_;
  uint32_t round_ = 0;
  bool has_last_ = false;
};

}  // namespace vmigrate::pager

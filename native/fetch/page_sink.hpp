#pragma once

#include <cstddef>
#include <cstdint>

#include "base/types.hpp"

namespace vmigrate::pager {

/// What happens to the pages that a lane has fetched. Each lane has a sink of its own, for its own thread.
class PageSink {
 public:
  virtual ~PageSink() = default;
  /// The run's bytes are complete, and its pages claimed by the caller: makes them present, and lets those
  /// run on that wait for them.
  virtual void publish(uint32_t region_index, PageRun run) = 0;
  /// A fault that was read waits for one of these pages. A hint: it may have changed already.
  virtual bool is_awaited(uint32_t region_index, PageRun run) const = 0;
  /// True if this many fetches may end before anything else must be done.
  virtual bool has_room(size_t fetch_count) const = 0;
  /// Runs are present that are not yet visible to all who wait for them.
  virtual bool has_deferred() const = 0;
  /// Tries those again. True: something has changed.
  virtual bool retry() = 0;
  /// Shows pages that were here before, a small piece of them for each call. False: there is nothing left.
  virtual bool show_some() { return false; }
};

}  // namespace vmigrate::pager

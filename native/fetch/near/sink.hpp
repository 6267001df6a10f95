#pragma once

#include "base/types.hpp"

namespace vmigrate::pager {

/// What happens to pages that near holders have brought. Each thread has a sink of its own.
class NearSink {
 public:
  virtual ~NearSink() = default;
  /// The run's bytes are complete, and its pages claimed by the caller. They become present; those that are
  /// not what their digests say become absent again, and are counted in the result.
  virtual uint64_t publish(uint32_t region_index, PageRun run) = 0;
  /// The caller gives its claims of the run up, and nothing writes into it any more: its pages are absent
  /// again, and whoever waits for them looks again.
  virtual void give_back(uint32_t region_index, PageRun run) = 0;
};

}  // namespace vmigrate::pager

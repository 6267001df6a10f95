#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "transport/region_keys.hpp"
#include "transport/transport.hpp"

namespace vmigrate::pager {

/// Connections to a holder of the pages, and its keys. Created anew for each connection, because a holder
/// that restarted has new keys.
struct SourceEndpoints {
  std::unique_ptr<transport::Endpoint> demand;
  std::unique_ptr<transport::Endpoint> bulk;
  std::vector<SourceRegionKeys> keys;  ///< one per region, in order
  /// If not 0, a session that has not begun tries each connection with a READ (probe.hpp).
  std::chrono::milliseconds probe_timeout{0};
};

struct FetchOptions {
  uint64_t bandwidth_bytes_per_s = 0;  ///< prefetch only; 0: no limit
  uint32_t prefetch_bytes_max = wire::kTransferBytesMax;
  /// Clusters that prefetch begins with (memory/touch_order.hpp).
  std::vector<uint32_t> order{};
};

}  // namespace vmigrate::pager

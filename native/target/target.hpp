#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "memory/region_config.hpp"
#include "transport/region_keys.hpp"
#include "transport/transport.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

/// Where the pages are. Made anew for each connection: a source that restarted has new keys.
struct SourceEndpoints {
  std::unique_ptr<transport::Endpoint> demand;
  std::unique_ptr<transport::Endpoint> bulk;
  std::vector<SourceRegionKeys> keys;  ///< one a region, in order
};

enum class TargetState : uint32_t {
  kIdle = 1,      ///< opened; faults wait in the kernel
  kFilling,       ///< serving faults and prefetching
  kDisconnected,  ///< connection lost: faults wait, claims are kept; connect() goes on
  kComplete,      ///< every page is here, ranges are unregistered, threads have ended
  kFailed,  ///< cannot go on by itself (no space, corrupt peer, VM gone); failure() says why. Faults wait.
  kClosed,
};

struct TargetOptions {
  uint64_t bandwidth_bytes_per_s = 0;  ///< prefetch only; 0: no limit
  uint32_t prefetch_bytes_max = wire::kTransferBytesMax;
};

/// The target's side of one post-copy: serves QEMU's faults first, fetches around them, then sweeps what is
/// left; never fetches pages that the source's data map says are holes. Owns its threads (one for faults and
/// demand, one for bulk); they end when the last page is here. Thread-safe for its callers.
class TargetSession {
 public:
  /// Opens region and presence files. `resume`: the presence map of an earlier process is taken over: pages
  /// present stay so, every waiter is woken once so that its fault is reported again. `memory` must outlive
  /// the session and be complete, its ranges registered for missing and minor. `on_edge` is called from a
  /// session thread when state() has changed; it must not block and not call back into the session.
  static Result<std::unique_ptr<TargetSession>> open(const VmMemory& memory,
                                                     std::span<const TargetRegionConfig> regions,
                                                     const TargetOptions& options, bool resume,
                                                     std::function<void()> on_edge);
  virtual ~TargetSession() = default;
  /// Gives the session its connections; from kIdle or kDisconnected. Operations that were under way when the
  /// old ones broke are posted again.
  virtual Status connect(SourceEndpoints endpoints) = 0;
  /// From kIdle, connected, or after serve_demand(): serve faults now, prefetch as soon as the data map is
  /// ready.
  virtual Status start() = 0;
  /// From kIdle, connected: serve faults now and fetch nothing else. start() adds the prefetch. For the time
  /// in which the VM is not running yet and its device state may touch a few pages while every cycle counts.
  virtual Status serve_demand() = 0;
  /// Ends the threads and waits for them. Pages not yet here stay absent or claimed in the presence file;
  /// faults wait. Idempotent.
  virtual void close() = 0;
  virtual TargetState state() const = 0;
  virtual std::optional<Error> failure() const = 0;
  virtual void counters(std::span<uint64_t, wire::kTargetCounterCount> out) const = 0;
};

}  // namespace vmigrate::pager

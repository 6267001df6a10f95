#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "memory/region_config.hpp"
#include "multicast/datagram/group.hpp"
#include "multicast/datagram/port.hpp"
#include "multicast/reports.hpp"

namespace vmigrate::multicast {

enum class SenderState : uint32_t {
  kWaiting = 1,  ///< for start
  kSending,
  kEnded,   ///< everything has been sent, or nobody listens (any more)
  kFailed,  ///< failure() says why; receivers have been told that it is over
  kClosed,
};

struct SenderConfig {
  /// The files of a complete image. Pages of 4 KiB only (kUnsupported).
  std::vector<pager::RegionFileConfig> image;
  Group group;
  uint64_t bandwidth_bytes_per_s = 0;  ///< 0: no limit
  /// Clusters that go first, after the wanted pages (memory/touch_order.hpp).
  std::vector<uint32_t> order{};
  /// Called by any thread when state() has changed; must not block or call back. May be empty.
  std::function<void()> on_edge;
  /// Instead of a port of the group's provider, for tests.
  std::unique_ptr<DatagramPort> port;
};

struct SenderCounters {
  uint64_t sent_bytes = 0;  ///< with all headers above IP
  uint64_t sent_pages = 0;
  uint64_t pages_total = 0;  ///< pages with data; 0 until the files have been looked at
  uint64_t sent_datagrams = 0;
  uint64_t rate_bytes_per_s = 0;
  uint64_t cpu_ns = 0;
};

/// Sends each page of an image that has data to a group, once: pages that receivers want first, as fast as
/// the slowest useful receiver can take them in (pacer.hpp). Nothing is sent again; what a receiver has lost
/// it reads by another way. It has a thread of its own from start on. Thread-safe.
class MulticastSender {
 public:
  /// Errors of the port, of the files, or kInvalidArgument.
  static Result<std::unique_ptr<MulticastSender>> open(SenderConfig config);
  /// Closes it.
  virtual ~MulticastSender() = default;
  /// From kWaiting. The files must be complete from now on.
  virtual Status start() = 0;
  /// Stops at any time, and tells the receivers that it is over. Idempotent; waits for the thread.
  virtual void close() = 0;

  virtual SenderState state() const = 0;
  virtual std::optional<Error> failure() const = 0;
  virtual SenderCounters counters() const = 0;
  virtual std::vector<MemberStatistics> members() const = 0;
};

}  // namespace vmigrate::multicast

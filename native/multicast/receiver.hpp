#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "base/result.hpp"
#include "multicast/datagram/group.hpp"
#include "multicast/datagram/port.hpp"
#include "multicast/sink.hpp"

namespace vmigrate::multicast {

/// kWaiting -> kReceiving <-> kSilent; one of them -> kEnded, kFailed, or kSilent for good.
enum class ReceiverState : uint32_t {
  kWaiting = 1,  ///< for the first datagram
  kReceiving,
  kSilent,  ///< nothing has come for a while, and no end; it may go on
  kEnded,   ///< the sender has said that nothing more comes, or the sink needs nothing more
  kFailed,  ///< failure() says why
};

struct ReceiverConfig {
  Group group;
  /// Not 0, not wire::kMulticastProbeMember, and used by no other receiver of this key.
  uint16_t member = 0;
  /// Must outlive the receiver.
  PageSink* sink = nullptr;
  /// Called by the receiver's thread when state() has changed, and once when it has ended; must not block.
  /// May be empty.
  std::function<void()> on_edge;
  /// Instead of a port of the group's provider, for tests.
  std::unique_ptr<DatagramPort> port;
};

struct ReceiverCounters {
  uint64_t received_bytes = 0;  ///< of genuine datagrams, each once, with the DatagramHeader
  uint64_t received_datagrams = 0;
  uint64_t lost_datagrams = 0;  ///< so far; one that is late is taken back
  uint64_t repeated_datagrams = 0;
  uint64_t rejected_datagrams = 0;  ///< of other sessions, forged, or senseless
  uint64_t evicted_pages = 0;       ///< of which a part has not come in time
  uint64_t sent_pages = 0;          ///< by the sender, from its end mark; 0 until then
  uint64_t cpu_ns = 0;
};

/// Receives the pages of a group and gives them to a sink, and tells the sender how much arrives. Only
/// datagrams of the group's key and session count. It has joined the group when open returns, and has a
/// thread of its own until it has ended. Thread-safe.
class MulticastReceiver {
 public:
  static Result<std::unique_ptr<MulticastReceiver>> open(ReceiverConfig config);
  /// Closes it.
  virtual ~MulticastReceiver() = default;
  /// Ends the thread, and waits for it. The state stays as it was. Idempotent.
  virtual void close() = 0;

  virtual ReceiverState state() const = 0;
  /// The thread has ended: nothing comes any more. From then on the counters stay.
  virtual bool has_ended() const = 0;
  virtual std::optional<Error> failure() const = 0;
  virtual ReceiverCounters counters() const = 0;
};

}  // namespace vmigrate::multicast

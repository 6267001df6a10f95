#pragma once

#include <cstdint>
#include <string>

#include "transport/transport.hpp"

namespace vmigrate::transport {

/// How RDMA connections behave. The defaults suit real networks and emulated ones.
struct VerbsOptions {
  /// connect, "localAddress": our data address, which determines device, port and GID. Empty: the routing
  /// table determines them.
  std::string local_host;
  /// "ackTimeoutExponent": an unanswered packet is sent again after 4.096 us * 2^this (18: 1.07 s) ...
  uint8_t ack_timeout_exponent = 18;
  /// "retryCount": ... this many times; then the connection is lost.
  uint8_t retry_count = 7;
  /// Retries while the peer has no buffer for a message; 7: for ever.
  uint8_t rnr_retry_count = 7;
};

/// kInvalidArgument: an unknown name, a value of the wrong kind, or a value that does not fit its InfiniBand
/// field.
Result<VerbsOptions> verbs_options(const Options& options);

}  // namespace vmigrate::transport

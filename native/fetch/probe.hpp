#pragma once

#include <chrono>

#include "base/result.hpp"
#include "transport/transport.hpp"

namespace vmigrate::pager {

/// Posts the read and waits for its completion, on a connection that nobody else uses meanwhile.
/// kPathStalled: no answer within `timeout`, and the operation stays outstanding. kDisconnected: the
/// connection is lost. Blocks.
Result<transport::OpResult> read_and_wait(transport::Endpoint& endpoint,
                                          const transport::Operation& operation,
                                          std::chrono::milliseconds timeout);

/// Length of the READ by which a new connection is tried: more than any network's largest frame.
inline constexpr uint32_t kProbeBytes = 64 << 10;

/// Reads the beginning of a data map over a connection that nobody uses yet, and drops it: the source's
/// memory itself must not be read before the scan, because reading a hole may fill it. Connecting needs small
/// packets only. A path that loses full-size ones would show that when the VM has stopped and waits for its
/// first page. Errors as for read_and_wait. Any answer of the source is fine, also that it cannot read there
/// now. Blocks.
Status probe_path(transport::Endpoint& endpoint, transport::LocalId buffer, const transport::RemoteKey& map,
                  std::chrono::milliseconds timeout);

}  // namespace vmigrate::pager

#pragma once

#include "transport/stream/served_session.hpp"

namespace vmigrate::transport {

/// Sends the files behind a session's keys, and messages, until the connection ends. This host does not see
/// what the peer then reads, so read counters stay 0 over shm.
void serve_shm(ServedConnection& connection, ServedSession& session);

}  // namespace vmigrate::transport

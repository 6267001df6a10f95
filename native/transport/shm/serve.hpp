#pragma once

#include "transport/stream/served_session.hpp"

namespace vmigrate::transport {

/// Hands out the files behind a session's keys, and messages, until the connection ends. What the peer then
/// reads is not known here: read counters stay 0 over shm.
void serve_shm(ServedConnection& connection, ServedSession& session);

}  // namespace vmigrate::transport

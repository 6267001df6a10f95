#pragma once

#include "transport/stream/served_session.hpp"

namespace vmigrate::transport {

/// Serves READ, WRITE and MESSAGE frames of one tcp connection until it ends.
void serve_tcp(ServedConnection& connection, ServedSession& session);

}  // namespace vmigrate::transport

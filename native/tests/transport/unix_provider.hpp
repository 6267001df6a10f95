#pragma once

#include "transport/transport.hpp"

namespace vmigrate::transport {

/// A provider that the product does not know: the frames of tcp through a unix socket. Code that works with
/// it works with any provider that is added, without a change elsewhere.
extern const Provider kUnixProvider;

}  // namespace vmigrate::transport

#pragma once

#include "transport/transport.hpp"

namespace vmigrate::transport {

/// A provider that the product does not know: frames as over tcp, through a unix socket. What works with it
/// works with any that is added, without a word of it elsewhere.
extern const Provider kUnixProvider;

}  // namespace vmigrate::transport

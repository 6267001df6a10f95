#pragma once

#include "transport/transport.hpp"

namespace vmigrate::transport {

extern const Provider kVerbsProvider;

}  // namespace vmigrate::transport

#pragma once

#include "transport/transport.hpp"

namespace vmigrate::transport {

extern const Provider kTcpProvider;

}  // namespace vmigrate::transport

#pragma once

#include "transport/transport.hpp"

namespace vmigrate::transport {

extern const Provider kShmProvider;

}  // namespace vmigrate::transport

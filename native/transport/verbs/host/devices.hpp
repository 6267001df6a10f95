#pragma once

#include <vector>

#include "base/result.hpp"
#include "transport/device.hpp"

namespace vmigrate::transport {

/// The RDMA devices of this host. Empty: the libraries are installed but there is no device.
Result<std::vector<Device>> verbs_devices();

}  // namespace vmigrate::transport

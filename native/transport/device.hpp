#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vmigrate::transport {

struct DevicePort {
  uint32_t number = 0;
  bool active = false;
  std::string state;       ///< as a person reads it: "active", "down" ...
  std::string link_layer;  ///< "InfiniBand" or "Ethernet"
  uint32_t mtu_bytes = 0;  ///< active path MTU; 0 if the device does not say
  std::vector<std::string> gids;
  /// IP addresses of this host that lead to this device, on an active port. A listener accepts any of them.
  std::vector<std::string> addresses;
};

/// A device that a provider uses to move bytes, if it needs more than the kernel's sockets.
struct Device {
  std::string name;
  bool on_demand_paging = false;
  std::vector<DevicePort> ports;
};

}  // namespace vmigrate::transport

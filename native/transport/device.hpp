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
  /// IP addresses of this host that lead here, of an active port; a listener takes any of them.
  std::vector<std::string> addresses;
};

/// What a provider moves bytes with, if that is more than the kernel's sockets.
struct Device {
  std::string name;
  bool on_demand_paging = false;
  std::vector<DevicePort> ports;
};

}  // namespace vmigrate::transport

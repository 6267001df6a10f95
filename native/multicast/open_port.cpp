#include "multicast/datagram/port.hpp"
#include "multicast/udp/port.hpp"
#include "multicast/verbs/port.hpp"

namespace vmigrate::multicast {

Result<std::unique_ptr<DatagramPort>> open_port(const Group& group, Role role) {
  if (group.provider == "udp") return open_udp_port(group, role);
  if (group.provider == "verbs") return open_verbs_port(group, role);
  return Error{ErrorCode::kUnsupported, 0, "no such provider of multicast"};
}

}  // namespace vmigrate::multicast

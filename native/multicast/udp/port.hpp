#pragma once

#include <memory>

#include "multicast/datagram/port.hpp"

namespace vmigrate::multicast {

/// A port of IP multicast. Packets are never fragmented: one that is larger than the MTU of a link on the way
/// is lost, which a probe shows.
Result<std::unique_ptr<DatagramPort>> open_udp_port(const Group& group, Role role);

}  // namespace vmigrate::multicast

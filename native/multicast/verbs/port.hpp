#pragma once

#include <memory>

#include "multicast/datagram/port.hpp"

namespace vmigrate::multicast {

/// A port of RDMA multicast: unreliable datagrams to a group that rdma_cm has joined. The group and the
/// interface are named by IP addresses, as those of UDP are; the group's port means nothing here.
/// kUnsupported if this build, or this host, has no RDMA.
Result<std::unique_ptr<DatagramPort>> open_verbs_port(const Group& group, Role role);

}  // namespace vmigrate::multicast

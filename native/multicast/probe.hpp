#pragma once

#include <chrono>
#include <cstdint>

#include "base/result.hpp"
#include "multicast/datagram/group.hpp"

namespace vmigrate::multicast {

/// Sends probes to the group for so long: packets of the largest size, and of the size that every Ethernet
/// takes. Before the multicast itself: it needs a port of its own. Blocks.
Status send_probes(const Group& group, std::chrono::milliseconds duration);

/// Joins the group and returns the size of the largest probe that arrives, as an IP packet; 0: none within
/// `timeout`. Returns early when one of the largest size has come, or when only smaller ones do. Blocks.
Result<uint32_t> receive_probes(const Group& group, std::chrono::milliseconds timeout);

}  // namespace vmigrate::multicast

#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "wire/wire_generated.hpp"

namespace vmigrate::multicast {

using Key = std::array<uint8_t, wire::kMulticastKeyBytes>;

/// One multicast of one image: where it is sent, and what all of its members know and nobody else.
struct Group {
  std::string provider;  ///< "udp" or "verbs"
  std::string address;   ///< IP address of the group
  uint16_t port = 0;
  std::string interface_address;  ///< of the interface here; empty: the one that the group's route names
  int ttl = 1;
  Key key{};  ///< of one session only: no nonce is ever used twice with it
  uint64_t session = 0;
  uint32_t mtu_bytes = 0;  ///< largest IP packet; 0: that of the interface
  /// The kernel merges datagrams that arrive together before it hands them over. It saves most of a
  /// receiver's processor time. Without it a packet filter sees, and a test loses, each datagram by itself.
  bool merges_received = true;
};

}  // namespace vmigrate::multicast

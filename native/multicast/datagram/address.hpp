#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <string>

#include "base/result.hpp"

namespace vmigrate::multicast {

/// An IP address with a port, of either family.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  int family() const { return storage.ss_family; }
  bool is_ipv6() const { return storage.ss_family == AF_INET6; }
  bool is_multicast() const;
  bool has_host_of(const SocketAddress& other) const;
  void set_port(uint16_t port);
  /// IPv6 groups of a link exist once on each.
  void set_interface(unsigned index);
};

/// kInvalidArgument unless `host` is an IP address.
Result<SocketAddress> parse_address(const std::string& host, uint16_t port);

/// An interface of this host.
struct Interface {
  unsigned index = 0;
  uint32_t mtu_bytes = 0;
  SocketAddress address;  ///< the one that it was found by, with port 0
};

/// The interface that has this address. kNotFound if there is none.
Result<Interface> interface_with(const std::string& address);
/// The interface that datagrams to the group leave by. kNotFound if no route leads there.
Result<Interface> interface_towards(const SocketAddress& group);

}  // namespace vmigrate::multicast

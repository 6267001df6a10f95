#include "multicast/datagram/address.hpp"

#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <sys/ioctl.h>

#include <cstring>
#include <memory>

#include "base/unique_fd.hpp"

namespace vmigrate::multicast {
namespace {

const in_addr& ipv4_of(const SocketAddress& address) {
  return reinterpret_cast<const sockaddr_in&>(address.storage).sin_addr;
}

const in6_addr& ipv6_of(const SocketAddress& address) {
  return reinterpret_cast<const sockaddr_in6&>(address.storage).sin6_addr;
}

Result<uint32_t> mtu_of(const char* interface_name, int family) {
  const UniqueFd fd(::socket(family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return system_error("socket");
  ifreq request{};
  std::strncpy(request.ifr_name, interface_name, sizeof(request.ifr_name) - 1);
  if (::ioctl(fd.get(), SIOCGIFMTU, &request) != 0) return system_error("MTU of the interface");
  return static_cast<uint32_t>(request.ifr_mtu);
}

Result<Interface> find(const SocketAddress& wanted) {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return system_error("getifaddrs");
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owned(list, &::freeifaddrs);
  for (const ifaddrs* one = list; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr || one->ifa_addr->sa_family != wanted.family()) continue;
    SocketAddress address;
    address.length = wanted.is_ipv6() ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
    std::memcpy(&address.storage, one->ifa_addr, address.length);
    if (!address.has_host_of(wanted)) continue;
    const auto mtu_bytes = mtu_of(one->ifa_name, wanted.family());
    if (!mtu_bytes) return mtu_bytes.error();
    address.set_port(0);
    return Interface{::if_nametoindex(one->ifa_name), mtu_bytes.value(), address};
  }
  return Error{ErrorCode::kNotFound, 0, "no interface here has the address"};
}

}  // namespace

bool SocketAddress::is_multicast() const {
  if (is_ipv6()) return IN6_IS_ADDR_MULTICAST(&ipv6_of(*this));
  return IN_MULTICAST(ntohl(ipv4_of(*this).s_addr));
}

bool SocketAddress::has_host_of(const SocketAddress& other) const {
  if (family() != other.family()) return false;
  return is_ipv6() ? IN6_ARE_ADDR_EQUAL(&ipv6_of(*this), &ipv6_of(other))
                   : ipv4_of(*this).s_addr == ipv4_of(other).s_addr;
}

void SocketAddress::set_port(uint16_t port) {
  if (is_ipv6())
    reinterpret_cast<sockaddr_in6&>(storage).sin6_port = htons(port);
  else
    reinterpret_cast<sockaddr_in&>(storage).sin_port = htons(port);
}

void SocketAddress::set_interface(unsigned index) {
  if (is_ipv6()) reinterpret_cast<sockaddr_in6&>(storage).sin6_scope_id = index;
}

Result<SocketAddress> parse_address(const std::string& host, uint16_t port) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST;
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0)
    return Error{ErrorCode::kInvalidArgument, 0, "not an IP address"};
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owned(found, &::freeaddrinfo);
  SocketAddress address;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  address.length = found->ai_addrlen;
  address.set_port(port);
  return address;
}

Result<Interface> interface_with(const std::string& address) {
  const auto parsed = parse_address(address, 0);
  if (!parsed) return parsed.error();
  return find(parsed.value());
}

/// The kernel chooses the source address of a socket that is connected, and sends nothing.
Result<Interface> interface_towards(const SocketAddress& group) {
  const UniqueFd fd(::socket(group.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return system_error("socket");
  if (::connect(fd.get(), group.get(), group.length) != 0)
    return Error{ErrorCode::kNotFound, errno, "no route to the multicast group: name an interface"};
  SocketAddress local;
  local.length = sizeof(local.storage);
  if (::getsockname(fd.get(), local.get(), &local.length) != 0) return system_error("getsockname");
  return find(local);
}

}  // namespace vmigrate::multicast

#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>

#include <cstring>

#include "transport/verbs/host/cm.hpp"

namespace vmigrate::transport {
namespace {

bool port_is_active(const rdma_cm_id& id) {
  const verbs_context* operations = verbs_get_ctx_op(id.verbs, query_port);
  if (operations == nullptr) return false;
  ibv_port_attr attributes{};
  return operations->query_port(id.verbs, id.port_num, &attributes, sizeof attributes) == 0 &&
         attributes.state == IBV_PORT_ACTIVE;
}

}  // namespace

Result<std::vector<VerbsPlace>> verbs_places() {
  auto channel = open_event_channel();
  if (!channel) return channel.error();
  ifaddrs* first = nullptr;
  if (::getifaddrs(&first) != 0) return system_error("getifaddrs");
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(first, &::freeifaddrs);
  std::vector<VerbsPlace> places;
  for (const ifaddrs* entry = first; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_LOOPBACK) != 0) continue;
    const int family = entry->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    SocketAddress address;
    address.length = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    std::memcpy(&address.storage, entry->ifa_addr, address.length);
    // A link-local address has no meaning without its interface.
    if (family == AF_INET6 &&
        IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<sockaddr_in6*>(&address.storage)->sin6_addr))
      continue;
    auto id = bind_cm_id(channel.value().get(), address);
    if (!id || !port_is_active(*id.value())) continue;
    char text[NI_MAXHOST];
    if (::getnameinfo(address.get(), address.length, text, sizeof text, nullptr, 0, NI_NUMERICHOST) == 0)
      places.push_back({text, verbs().ibv.get_device_name(id.value()->verbs->device), id.value()->port_num});
  }
  return places;
}

}  // namespace vmigrate::transport

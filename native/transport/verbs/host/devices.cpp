// Information about this host's RDMA devices, for people and for pre-flight. Nothing here is on a data path.

#include "transport/verbs/host/devices.hpp"

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "transport/verbs/host/cm.hpp"

namespace vmigrate::transport {
namespace {

/// A port may have hundreds of GIDs, one for each address of its VLANs.
constexpr int kGidsShownMax = 16;

struct DeviceCloser {
  void operator()(ibv_context* device) const { (void)verbs().ibv.close_device(device); }
};
struct ListFreer {
  void operator()(ibv_device** list) const { verbs().ibv.free_device_list(list); }
};

const char* state_name(ibv_port_state state) {
  switch (state) {
    case IBV_PORT_DOWN:
      return "down";
    case IBV_PORT_INIT:
      return "initializing";
    case IBV_PORT_ARMED:
      return "armed";
    case IBV_PORT_ACTIVE:
      return "active";
    case IBV_PORT_ACTIVE_DEFER:
      return "active, deferred";
    default:
      return "unknown";
  }
}

std::vector<std::string> gids_of(ibv_context* device, uint8_t port, int table_entries) {
  std::vector<std::string> gids;
  for (int i = 0; i < std::min(table_entries, kGidsShownMax); ++i) {
    ibv_gid gid{};
    if (verbs().ibv.query_gid(device, port, i, &gid) != 0) continue;
    const auto is_zero = [](uint8_t byte) { return byte == 0; };
    if (std::all_of(std::begin(gid.raw), std::end(gid.raw), is_zero)) continue;
    std::array<char, INET6_ADDRSTRLEN> text{};
    if (::inet_ntop(AF_INET6, gid.raw, text.data(), text.size()) != nullptr) gids.emplace_back(text.data());
  }
  return gids;
}

DevicePort describe_port(ibv_context* device, uint8_t number) {
  DevicePort port;
  port.number = number;
  port.state = "unknown";
  const verbs_context* operations = verbs_get_ctx_op(device, query_port);
  ibv_port_attr attributes{};
  if (operations == nullptr || operations->query_port(device, number, &attributes, sizeof attributes) != 0)
    return port;
  port.active = attributes.state == IBV_PORT_ACTIVE;
  port.state = state_name(attributes.state);
  port.link_layer = attributes.link_layer == IBV_LINK_LAYER_ETHERNET ? "Ethernet" : "InfiniBand";
  // 1 stands for 256 bytes, 5 for 4096.
  if (attributes.active_mtu >= IBV_MTU_256 && attributes.active_mtu <= IBV_MTU_4096)
    port.mtu_bytes = 128u << attributes.active_mtu;
  port.gids = gids_of(device, number, attributes.gid_tbl_len);
  return port;
}

/// A device that cannot be queried (its driver is missing, or it is being removed) is listed without ports.
Device describe(ibv_device* listed) {
  Device device;
  device.name = verbs().ibv.get_device_name(listed);
  const std::unique_ptr<ibv_context, DeviceCloser> context(verbs().ibv.open_device(listed));
  if (context == nullptr) return device;
  if (const auto traits = query_device(context.get()); traits.ok())
    device.on_demand_paging = traits.value().on_demand_paging;
  ibv_device_attr attributes{};
  if (verbs().ibv.query_device(context.get(), &attributes) != 0) return device;
  for (uint32_t port = 1; port <= attributes.phys_port_cnt; ++port)
    device.ports.push_back(describe_port(context.get(), static_cast<uint8_t>(port)));
  return device;
}

}  // namespace

Result<std::vector<Device>> verbs_devices() {
  if (Status loaded = load_verbs(); !loaded) return loaded.error();
  int count = 0;
  const std::unique_ptr<ibv_device*, ListFreer> list(verbs().ibv.get_device_list(&count));
  if (list == nullptr) {
    // No module of the kernel's RDMA is loaded.
    if (errno == ENOSYS) return std::vector<Device>{};
    return system_error("list RDMA devices");
  }
  std::vector<Device> devices;
  for (int i = 0; i < count; ++i) devices.push_back(describe(list.get()[i]));
  const auto places = verbs_places();
  if (!places) return devices.empty() ? Result<std::vector<Device>>(devices) : places.error();
  for (const VerbsPlace& place : places.value()) {
    for (Device& device : devices) {
      if (device.name != place.device) continue;
      for (DevicePort& port : device.ports)
        if (port.number == place.port) port.addresses.push_back(place.address);
    }
  }
  return devices;
}

}  // namespace vmigrate::transport

#include "multicast/verbs/port.hpp"

#include <poll.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "multicast/datagram/limits.hpp"
#include "multicast/verbs/queues.hpp"
#include "transport/verbs/host/cm.hpp"

namespace vmigrate::multicast {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using transport::verbs;

/// Joining a group may need an answer of the fabric's subnet manager.
constexpr milliseconds kJoinTimeout{5000};
constexpr milliseconds kQueueTimeout{100};
/// Headers of RoCE: IPv4, UDP, base transport, datagram transport, and the checksum behind.
constexpr size_t kOverheadBytes = 20 + 8 + 12 + 8 + 4;

class VerbsPort final : public DatagramPort {
 public:
  ~VerbsPort() override {
    if (has_joined_) (void)verbs().rdma.leave_multicast(id_.get(), group_address_.get());
  }
  Status open(const Group& group, Role role);

  size_t datagram_bytes_max() const override { return datagram_bytes_max_; }
  size_t overhead_bytes() const override { return kOverheadBytes; }
  int event_fd() const override { return queues_.event_fd(); }
  Status send(std::span<const std::byte> bytes, size_t datagram_bytes) override;
  Result<size_t> receive(DatagramVisitor& visitor) override;
  void adopt_source() override;
  void answer(std::span<const std::byte> datagram) override {
    if (source_handle_ == nullptr) return;
    const Destination source{source_handle_.get(), source_queue_pair_, group_.key};
    (void)queues_.send(datagram, datagram.size(), source, milliseconds(0));
  }

 private:
  Status bind(const Group& group);
  Result<size_t> mtu_bytes() const;
  Status join(Role role);
  Status wait_for(rdma_cm_event_type wanted);

  transport::EventChannel events_;
  transport::CmId id_;
  SocketAddress group_address_;
  size_t datagram_bytes_max_ = 0;
  DatagramQueues queues_;
  bool has_joined_ = false;
  ibv_ah_attr group_route_{};
  AddressHandle group_handle_, source_handle_;
  Destination group_;
  const DatagramQueues::Arrived* visiting_ = nullptr;  ///< the datagram that is being shown
  ibv_gid source_gid_{};
  uint32_t source_queue_pair_ = 0;
};

/// Waits for an event of the connection manager, and takes over what a join tells.
Status VerbsPort::wait_for(rdma_cm_event_type wanted) {
  const auto deadline = steady_clock::now() + kJoinTimeout;
  for (;;) {
    rdma_cm_event* event = nullptr;
    if (verbs().rdma.get_cm_event(events_.get(), &event) == 0) {
      const rdma_cm_event_type type = event->event;
      const int status = event->status;
      if (type == RDMA_CM_EVENT_MULTICAST_JOIN) {
        group_route_ = event->param.ud.ah_attr;
        group_.queue_pair = event->param.ud.qp_num;
        group_.key = event->param.ud.qkey;
      }
      (void)verbs().rdma.ack_cm_event(event);
      if (type == wanted) return ok();
      if (type == RDMA_CM_EVENT_ADDR_CHANGE) continue;
      if (type == RDMA_CM_EVENT_MULTICAST_ERROR)
        return system_error("join the RDMA multicast group", status < 0 ? -status : ECONNREFUSED);
      return transport::connect_error(type, status, nullptr);
    }
    if (errno != EAGAIN && errno != EINTR) return system_error("get RDMA connection event");
    const auto left = std::chrono::ceil<milliseconds>(deadline - steady_clock::now());
    if (left.count() <= 0) return Error{ErrorCode::kTimeout, 0, "join the RDMA multicast group"};
    pollfd watched{.fd = events_->fd, .events = POLLIN, .revents = 0};
    (void)::poll(&watched, 1, static_cast<int>(left.count()));
  }
}

/// The address of the interface determines device, port and GID.
Status VerbsPort::bind(const Group& group) {
  const auto address = parse_address(group.address, group.port);
  if (!address) return address.error();
  if (!address.value().is_multicast())
    return Error{ErrorCode::kInvalidArgument, 0, "not the address of a multicast group"};
  group_address_ = address.value();
  auto interface = group.interface_address.empty() ? interface_towards(group_address_)
                                                   : interface_with(group.interface_address);
  if (!interface) return interface.error();
  SocketAddress& own = interface.value().address;
  if (own.family() != group_address_.family())
    return Error{ErrorCode::kInvalidArgument, 0, "group and interface are of different IP versions"};
  group_address_.set_interface(interface.value().index);
  auto channel = transport::open_event_channel();
  if (!channel) return channel.error();
  events_ = std::move(channel).value();
  rdma_cm_id* id = nullptr;
  if (verbs().rdma.create_id(events_.get(), &id, nullptr, RDMA_PS_UDP) != 0)
    return system_error("create rdma_cm id");
  id_.reset(id);
  if (verbs().rdma.resolve_addr(id, own.get(), group_address_.get(),
                                static_cast<int>(kJoinTimeout.count())) != 0) {
    if (errno == ENODEV) return Error{ErrorCode::kUnsupported, ENODEV, "no RDMA device has this address"};
    return system_error("resolve the RDMA multicast group");
  }
  return wait_for(RDMA_CM_EVENT_ADDR_RESOLVED);
}

Result<size_t> VerbsPort::mtu_bytes() const {
  const verbs_context* operations = verbs_get_ctx_op(id_->verbs, query_port);
  ibv_port_attr attributes{};
  if (operations == nullptr ||
      operations->query_port(id_->verbs, id_->port_num, &attributes, sizeof attributes) != 0 ||
      attributes.active_mtu < IBV_MTU_256 || attributes.active_mtu > IBV_MTU_4096)
    return Error{ErrorCode::kSystem, 0, "MTU of the RDMA port"};
  return size_t{128} << attributes.active_mtu;
}

/// A sender does not receive what it sends, where the device allows that. Otherwise it drops it.
Status VerbsPort::join(Role role) {
  rdma_cm_join_mc_attr_ex attributes{};
  attributes.comp_mask = RDMA_CM_JOIN_MC_ATTR_ADDRESS | RDMA_CM_JOIN_MC_ATTR_JOIN_FLAGS;
  attributes.addr = group_address_.get();
  attributes.join_flags =
      role == Role::kSender ? RDMA_MC_JOIN_FLAG_SENDONLY_FULLMEMBER : RDMA_MC_JOIN_FLAG_FULLMEMBER;
  if (verbs().rdma.join_multicast_ex(id_.get(), &attributes, nullptr) != 0) {
    attributes.join_flags = RDMA_MC_JOIN_FLAG_FULLMEMBER;
    if (verbs().rdma.join_multicast_ex(id_.get(), &attributes, nullptr) != 0)
      return system_error("join the RDMA multicast group");
  }
  has_joined_ = true;
  if (auto joined = wait_for(RDMA_CM_EVENT_MULTICAST_JOIN); !joined) return joined;
  group_handle_.reset(verbs().ibv.create_ah(queues_.pd(), &group_route_));
  if (group_handle_ == nullptr) return system_error("create the address handle of a multicast group");
  group_.handle = group_handle_.get();
  return ok();
}

Status VerbsPort::open(const Group& group, Role role) {
  if (auto loaded = transport::load_verbs(); !loaded) return loaded;
  if (auto bound = bind(group); !bound) return bound;
  const auto mtu = mtu_bytes();
  if (!mtu) return mtu.error();
  datagram_bytes_max_ = mtu.value();
  if (group.mtu_bytes > kOverheadBytes)
    datagram_bytes_max_ = std::min<size_t>(datagram_bytes_max_, group.mtu_bytes - kOverheadBytes);
  if (auto opened = queues_.open(id_.get(), mtu.value()); !opened) return opened;
  return join(role);
}

Status VerbsPort::send(std::span<const std::byte> bytes, size_t datagram_bytes) {
  return queues_.send(bytes, datagram_bytes, group_, kQueueTimeout);
}

Result<size_t> VerbsPort::receive(DatagramVisitor& visitor) {
  const auto count = queues_.receive([&](const DatagramQueues::Arrived& arrived) {
    visiting_ = &arrived;
    visitor.on_datagram(arrived.datagram);
  });
  visiting_ = nullptr;
  return count;
}

/// The route header has the address that the datagram comes from: of RoCE over IPv4 it is an IPv4 header in
/// the last bytes.
void VerbsPort::adopt_source() {
  if (visiting_ == nullptr || visiting_->route_header.empty()) return;
  const std::byte* header = visiting_->route_header.data();
  ibv_gid gid{};
  constexpr size_t kIpv4At = 20, kIpv4SourceAt = kIpv4At + 12, kIpv6SourceAt = 8;
  if (header[kIpv4At] == std::byte{0x45}) {
    gid.raw[10] = gid.raw[11] = 0xff;
    std::memcpy(gid.raw + 12, header + kIpv4SourceAt, 4);
  } else {
    std::memcpy(gid.raw, header + kIpv6SourceAt, sizeof(gid.raw));
  }
  const bool is_known = source_handle_ != nullptr && source_queue_pair_ == visiting_->from_queue_pair &&
                        std::memcmp(gid.raw, source_gid_.raw, sizeof(gid.raw)) == 0;
  if (is_known) return;
  ibv_ah_attr route = group_route_;
  route.grh.dgid = gid;
  route.dlid = visiting_->from_local_id;
  source_handle_.reset(verbs().ibv.create_ah(queues_.pd(), &route));
  source_gid_ = gid;
  source_queue_pair_ = visiting_->from_queue_pair;
}

}  // namespace

Result<std::unique_ptr<DatagramPort>> open_verbs_port(const Group& group, Role role) {
  auto port = std::make_unique<VerbsPort>();
  if (auto opened = port->open(group, role); !opened) return opened.error();
  return std::unique_ptr<DatagramPort>(std::move(port));
}

}  // namespace vmigrate::multicast

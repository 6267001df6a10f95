#include "multicast/udp/port.hpp"

#include <netinet/udp.h>
#include <sys/time.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "base/unique_fd.hpp"
#include "multicast/datagram/address.hpp"
#include "multicast/datagram/limits.hpp"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

namespace vmigrate::multicast {
namespace {

constexpr size_t kPacketBytesMax = 65535;
/// Messages that one call receives. Each may be a chain of merged datagrams, of at most 64 KiB.
constexpr size_t kMessages = 16;
constexpr size_t kMessageBytes = 64 << 10;
/// How long a full send buffer may delay the sender.
constexpr timeval kSendTimeout{.tv_sec = 0, .tv_usec = 100'000};

template <typename Value>
Status set_option(int fd, int level, int name, const Value& value, const char* what) {
  return ::setsockopt(fd, level, name, &value, sizeof(value)) == 0 ? ok() : Status(system_error(what));
}

class UdpPort final : public DatagramPort {
 public:
  UdpPort(UniqueFd fd, SocketAddress group, size_t overhead_bytes, size_t datagram_bytes_max)
      : fd_(std::move(fd)),
        group_(group),
        overhead_bytes_(overhead_bytes),
        datagram_bytes_max_(datagram_bytes_max),
        buffer_(kMessages * kMessageBytes) {
    for (size_t i = 0; i < kMessages; ++i) {
      parts_[i] = {buffer_.data() + i * kMessageBytes, kMessageBytes};
      messages_[i].msg_hdr.msg_iov = &parts_[i];
      messages_[i].msg_hdr.msg_iovlen = 1;
    }
  }

  size_t datagram_bytes_max() const override { return datagram_bytes_max_; }
  size_t overhead_bytes() const override { return overhead_bytes_; }
  int event_fd() const override { return fd_.get(); }
  Status send(std::span<const std::byte> bytes, size_t datagram_bytes) override;
  Result<size_t> receive(DatagramVisitor& visitor) override;
  void adopt_source() override {
    if (visiting_ != nullptr) source_ = *visiting_;
  }
  void answer(std::span<const std::byte> datagram) override {
    if (source_.length == 0) return;
    (void)::sendto(fd_.get(), datagram.data(), datagram.size(), MSG_DONTWAIT | MSG_NOSIGNAL, source_.get(),
                   source_.length);
  }

 private:
  Status send_chain(std::span<const std::byte> bytes, size_t datagram_bytes);
  Status send_each(std::span<const std::byte> bytes, size_t datagram_bytes);
  size_t visit(const msghdr& message, size_t length_bytes, DatagramVisitor& visitor);

  const UniqueFd fd_;
  SocketAddress group_, source_;
  const size_t overhead_bytes_, datagram_bytes_max_;
  bool sends_chains_ = true;
  std::vector<std::byte> buffer_;
  std::array<mmsghdr, kMessages> messages_{};
  std::array<iovec, kMessages> parts_{};
  std::array<SocketAddress, kMessages> seen_from_;
  const SocketAddress* visiting_ = nullptr;  ///< of the datagram that is being shown
  struct alignas(cmsghdr) Control {
    char bytes[CMSG_SPACE(sizeof(int))];
  };
  std::array<Control, kMessages> control_;
};

/// No room now, or a queue on the way is full: these datagrams are lost, like others on the way.
bool is_loss(int error) {
  return error == EAGAIN || error == EWOULDBLOCK || error == ENOBUFS || error == ENOMEM;
}

Status UdpPort::send(std::span<const std::byte> bytes, size_t datagram_bytes) {
  if (sends_chains_ && bytes.size() > datagram_bytes) return send_chain(bytes, datagram_bytes);
  return send_each(bytes, datagram_bytes);
}

Status UdpPort::send_chain(std::span<const std::byte> bytes, size_t datagram_bytes) {
  iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(uint16_t))]{};
  msghdr message{};
  message.msg_name = group_.get();
  message.msg_namelen = group_.length;
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* head = CMSG_FIRSTHDR(&message);
  head->cmsg_level = SOL_UDP;
  head->cmsg_type = UDP_SEGMENT;
  head->cmsg_len = CMSG_LEN(sizeof(uint16_t));
  const auto segment_bytes = static_cast<uint16_t>(datagram_bytes);
  std::memcpy(CMSG_DATA(head), &segment_bytes, sizeof(segment_bytes));
  for (;;) {
    if (::sendmsg(fd_.get(), &message, MSG_NOSIGNAL) >= 0) return ok();
    if (errno == EINTR) continue;
    if (is_loss(errno)) return ok();
    break;
  }
  // An old kernel, or a device that cannot compute checksums. If it was something else, it shows at once.
  if (errno != EINVAL && errno != EIO && errno != EOPNOTSUPP && errno != ENOPROTOOPT)
    return system_error("send to the multicast group");
  sends_chains_ = false;
  return send_each(bytes, datagram_bytes);
}

Status UdpPort::send_each(std::span<const std::byte> bytes, size_t datagram_bytes) {
  std::array<mmsghdr, kBatchDatagramsMax> messages{};
  std::array<iovec, kBatchDatagramsMax> parts;
  unsigned count = 0;
  for (size_t at = 0; at < bytes.size() && count < messages.size(); at += datagram_bytes) {
    parts[count] = {const_cast<std::byte*>(bytes.data()) + at, std::min(datagram_bytes, bytes.size() - at)};
    msghdr& message = messages[count].msg_hdr;
    message.msg_name = group_.get();
    message.msg_namelen = group_.length;
    message.msg_iov = &parts[count++];
    message.msg_iovlen = 1;
  }
  for (unsigned sent = 0; sent < count;) {
    const int done = ::sendmmsg(fd_.get(), &messages[sent], count - sent, MSG_NOSIGNAL);
    if (done > 0) {
      sent += static_cast<unsigned>(done);
      continue;
    }
    if (done < 0 && errno == EINTR) continue;
    if (done < 0 && !is_loss(errno)) return system_error("send to the multicast group");
    ++sent;  // this one is lost
  }
  return ok();
}

Result<size_t> UdpPort::receive(DatagramVisitor& visitor) {
  for (size_t i = 0; i < kMessages; ++i) {
    msghdr& message = messages_[i].msg_hdr;
    message.msg_name = seen_from_[i].get();
    message.msg_namelen = sizeof(seen_from_[i].storage);
    message.msg_control = control_[i].bytes;
    message.msg_controllen = sizeof(control_[i].bytes);
  }
  int count;
  do count = ::recvmmsg(fd_.get(), messages_.data(), kMessages, MSG_DONTWAIT, nullptr);
  while (count < 0 && errno == EINTR);
  if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return size_t{0};
  if (count < 0) return system_error("receive from the multicast group");
  size_t visited = 0;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    seen_from_[i].length = messages_[i].msg_hdr.msg_namelen;
    visiting_ = &seen_from_[i];
    visited += visit(messages_[i].msg_hdr, messages_[i].msg_len, visitor);
  }
  visiting_ = nullptr;
  return std::max<size_t>(visited, 1);
}

/// Shows the datagrams of one message: a chain of equal ones, of which the last may be shorter.
size_t UdpPort::visit(const msghdr& message, size_t length_bytes, DatagramVisitor& visitor) {
  size_t datagram_bytes = length_bytes;
  for (const cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr;
       head = CMSG_NXTHDR(const_cast<msghdr*>(&message), const_cast<cmsghdr*>(head))) {
    if (head->cmsg_level != SOL_UDP || head->cmsg_type != UDP_GRO) continue;
    int segment_bytes = 0;
    std::memcpy(&segment_bytes, CMSG_DATA(head), sizeof(segment_bytes));
    if (segment_bytes > 0) datagram_bytes = static_cast<size_t>(segment_bytes);
  }
  const auto* bytes = static_cast<const std::byte*>(message.msg_iov->iov_base);
  size_t count = 0;
  for (size_t at = 0; at < length_bytes; at += datagram_bytes, ++count)
    visitor.on_datagram({bytes + at, std::min(datagram_bytes, length_bytes - at)});
  return count;
}

Status set_up_common(int fd, bool is_ipv6) {
  // The packets of our group alone, not those of every group that this host has joined.
  const int none = 0;
  const int level = is_ipv6 ? IPPROTO_IPV6 : IPPROTO_IP;
  if (auto status =
          set_option(fd, level, is_ipv6 ? IPV6_MULTICAST_ALL : IP_MULTICAST_ALL, none, "IP_MULTICAST_ALL");
      !status)
    return status;
  // PROBE: never fragment, and do not believe messages about the MTU either, which anybody can forge.
  const int never = is_ipv6 ? IPV6_PMTUDISC_PROBE : IP_PMTUDISC_PROBE;
  return set_option(fd, level, is_ipv6 ? IPV6_MTU_DISCOVER : IP_MTU_DISCOVER, never, "IP_MTU_DISCOVER");
}

/// Reports come to the group's port if it is free here, so that a firewall needs one number; otherwise, if
/// this host sends to two groups, to any.
Status set_up_sender(int fd, const Group& group, const Interface& interface) {
  const bool is_ipv6 = interface.address.is_ipv6();
  if (is_ipv6) {
    const int index = static_cast<int>(interface.index);
    if (auto set = set_option(fd, IPPROTO_IPV6, IPV6_MULTICAST_IF, index, "IPV6_MULTICAST_IF"); !set)
      return set;
    if (auto set = set_option(fd, IPPROTO_IPV6, IPV6_MULTICAST_HOPS, group.ttl, "IPV6_MULTICAST_HOPS"); !set)
      return set;
  } else {
    ip_mreqn request{};
    request.imr_ifindex = static_cast<int>(interface.index);
    if (auto set = set_option(fd, IPPROTO_IP, IP_MULTICAST_IF, request, "IP_MULTICAST_IF"); !set) return set;
    if (auto set = set_option(fd, IPPROTO_IP, IP_MULTICAST_TTL, group.ttl, "IP_MULTICAST_TTL"); !set)
      return set;
  }
  (void)::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kSendBufferBytes, sizeof(kSendBufferBytes));
  (void)::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &kSendTimeout, sizeof(kSendTimeout));
  SocketAddress own = interface.address;
  own.set_port(group.port);
  if (::bind(fd, own.get(), own.length) == 0) return ok();
  own.set_port(0);
  return ::bind(fd, own.get(), own.length) == 0 ? ok() : Status(system_error("bind for reports"));
}

/// Bound to the group's address, so that it gets nothing else; several receivers of one host share it.
Status set_up_receiver(int fd, const Group& group, const SocketAddress& address, const Interface& interface) {
  const int yes = 1;
  if (auto set = set_option(fd, SOL_SOCKET, SO_REUSEADDR, yes, "SO_REUSEADDR"); !set) return set;
  if (::setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &kReceiveBufferBytes, sizeof(kReceiveBufferBytes)) != 0)
    (void)::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &kReceiveBufferBytes, sizeof(kReceiveBufferBytes));
  // An old kernel has no such option and merges nothing.
  if (group.merges_received) (void)::setsockopt(fd, SOL_UDP, UDP_GRO, &yes, sizeof(yes));
  if (::bind(fd, address.get(), address.length) != 0) return system_error("bind to the multicast group");
  group_req request{};
  request.gr_interface = interface.index;
  std::memcpy(&request.gr_group, &address.storage, sizeof(request.gr_group));
  return set_option(fd, address.is_ipv6() ? IPPROTO_IPV6 : IPPROTO_IP, MCAST_JOIN_GROUP, request,
                    "join the multicast group");
}

}  // namespace

Result<std::unique_ptr<DatagramPort>> open_udp_port(const Group& group, Role role) {
  auto address = parse_address(group.address, group.port);
  if (!address) return address.error();
  if (!address.value().is_multicast() || group.port == 0)
    return Error{ErrorCode::kInvalidArgument, 0, "not the address of a multicast group"};
  const auto interface = group.interface_address.empty() ? interface_towards(address.value())
                                                         : interface_with(group.interface_address);
  if (!interface) return interface.error();
  if (interface.value().address.family() != address.value().family())
    return Error{ErrorCode::kInvalidArgument, 0, "group and interface are of different IP versions"};
  address.value().set_interface(interface.value().index);
  const bool is_ipv6 = address.value().is_ipv6();
  UniqueFd fd(::socket(address.value().family(), SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return system_error("socket");
  if (auto status = set_up_common(fd.get(), is_ipv6); !status) return status.error();
  const Status ready = role == Role::kSender
                           ? set_up_sender(fd.get(), group, interface.value())
                           : set_up_receiver(fd.get(), group, address.value(), interface.value());
  if (!ready) return ready.error();
  const size_t overhead_bytes = (is_ipv6 ? 40 : 20) + kUdpHeaderBytes;
  size_t packet_bytes = std::min<size_t>(interface.value().mtu_bytes, kPacketBytesMax);
  if (group.mtu_bytes != 0) packet_bytes = std::min<size_t>(packet_bytes, group.mtu_bytes);
  if (packet_bytes < overhead_bytes + wire::kDatagramHeaderBytes + wire::kDatagramGrainBytes)
    return Error{ErrorCode::kInvalidArgument, 0, "MTU"};
  return std::unique_ptr<DatagramPort>(
      new UdpPort(std::move(fd), address.value(), overhead_bytes, packet_bytes - overhead_bytes));
}

}  // namespace vmigrate::multicast

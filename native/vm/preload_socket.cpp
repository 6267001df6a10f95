#include "vm/preload_socket.hpp"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstring>

namespace vmigrate::pager {

namespace {

constexpr int kBacklog = 8;

bool is_stale(const sockaddr_un& address) {
  UniqueFd probe(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!probe.valid()) return false;
  return ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 &&
         errno == ECONNREFUSED;
}

template <typename Record>
Status send_record(int connection, const Record& record) {
  for (;;) {
    if (::send(connection, &record, sizeof record, MSG_DONTWAIT | MSG_NOSIGNAL) == sizeof record) return ok();
    if (errno != EINTR) return system_error("send to the preload");
  }
}

}  // namespace

Result<UniqueFd> listen_preload(const std::string& path, uid_t peer_uid) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path[0] != '/' || path.size() >= sizeof address.sun_path)
    return Error{ErrorCode::kInvalidArgument, 0,
                 "preload socket path must be absolute and fit a unix socket"};
  std::memcpy(address.sun_path, path.c_str(), path.size());
  UniqueFd listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener.valid()) return system_error("socket");
  // The file is created with the mode of the socket's own inode, so nobody else can connect between bind and
  // chmod.
  if (::fchmod(listener.get(), 0600) != 0) return system_error("fchmod preload socket");
  const auto bind_it = [&] {
    return ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  };
  if (bind_it() != 0) {
    if (errno != EADDRINUSE) return system_error("bind preload socket");
    if (!is_stale(address)) return Error{ErrorCode::kAlreadyExists, EADDRINUSE, "bind preload socket"};
    if (::unlink(path.c_str()) != 0 && errno != ENOENT) return system_error("unlink preload socket");
    if (bind_it() != 0) return system_error("bind preload socket");
  }
  // The name may lie in a directory of the peer, so it is not followed if it is a link by now.
  if (peer_uid != ::geteuid() && ::lchown(path.c_str(), peer_uid, static_cast<gid_t>(peer_uid)) != 0)
    return system_error("chown preload socket");
  if (::listen(listener.get(), kBacklog) != 0) return system_error("listen preload socket");
  return listener;
}

Result<PreloadPeer> accept_preload(int listener, uid_t peer_uid) {
  int fd;
  do fd = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    if (errno == EAGAIN || errno == ECONNABORTED) return PreloadPeer{};
    return system_error("accept preload connection");
  }
  PreloadPeer peer{UniqueFd(fd), -1};
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0)
    return system_error("SO_PEERCRED");
  if (credentials.uid != peer_uid || credentials.pid <= 0) return PreloadPeer{};
  peer.pid = credentials.pid;
  return peer;
}

Result<PreloadRecord> receive_record(int connection, std::span<std::byte> out) {
  alignas(cmsghdr) char control[CMSG_SPACE(wire::kPreloadDescriptorsMax * sizeof(int))];
  iovec body{out.data(), out.size()};
  msghdr message{};
  message.msg_iov = &body;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t received;
  do received = ::recvmsg(connection, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  while (received < 0 && errno == EINTR);
  PreloadRecord record;
  if (received < 0) {
    if (errno != EAGAIN) return system_error("receive from preload");
    record.is_waiting = true;
    return record;
  }
  record.length_bytes = static_cast<size_t>(received);
  const bool is_control_cut = (message.msg_flags & MSG_CTRUNC) != 0;
  record.is_cut = is_control_cut || (message.msg_flags & MSG_TRUNC) != 0;
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      record.descriptors.emplace_back(fd);
    }
  }
  // There was room for more descriptors than came, so the kernel could not install the others in this
  // process.
  record.lacks_descriptors = is_control_cut && record.descriptors.size() < wire::kPreloadDescriptorsMax;
  return record;
}

Status send_ack(int connection, wire::PreloadStatus status) {
  wire::PreloadAck ack{};
  ack.magic = wire::kPreloadMagic;
  ack.op = static_cast<uint16_t>(wire::PreloadOp::kAck);
  ack.status = static_cast<uint16_t>(status);
  return send_record(connection, ack);
}

Status send_trim(int connection, uint32_t hold_ms) {
  wire::PreloadTrim trim{};
  trim.magic = wire::kPreloadMagic;
  trim.op = static_cast<uint16_t>(wire::PreloadOp::kTrim);
  trim.hold_ms = hold_ms;
  return send_record(connection, trim);
}

}  // namespace vmigrate::pager

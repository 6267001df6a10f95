#include "transport/socket.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/un.h>

#include <cstring>
#include <thread>

namespace vmigrate::transport {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

Result<SocketAddress> tcp_socket_address(const Address& address) {
  SocketAddress out;
  auto* v4 = reinterpret_cast<sockaddr_in*>(&out.storage);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&out.storage);
  if (::inet_pton(AF_INET, address.host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(address.port);
    out.length = sizeof *v4;
    return out;
  }
  if (::inet_pton(AF_INET6, address.host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(address.port);
    out.length = sizeof *v6;
    return out;
  }
  return Error{ErrorCode::kInvalidArgument, 0, "data address is not an IP address"};
}

Result<SocketAddress> unix_socket_address(const std::string& path) {
  SocketAddress out;
  auto* local = reinterpret_cast<sockaddr_un*>(&out.storage);
  if (path.empty() || path.size() >= sizeof local->sun_path || path.find('\0') != std::string::npos)
    return Error{ErrorCode::kInvalidArgument, 0, "data socket path is empty or too long"};
  local->sun_family = AF_UNIX;
  std::memcpy(local->sun_path, path.c_str(), path.size() + 1);
  out.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() + 1);
  return out;
}

Status set_tcp_options(int fd) {
  struct Option {
    int level, name, value;
  };
  constexpr Option options[] = {
      {IPPROTO_TCP, TCP_NODELAY, 1},   {SOL_SOCKET, SO_KEEPALIVE, 1}, {IPPROTO_TCP, TCP_KEEPIDLE, 4},
      {IPPROTO_TCP, TCP_KEEPINTVL, 2}, {IPPROTO_TCP, TCP_KEEPCNT, 3}, {IPPROTO_TCP, TCP_USER_TIMEOUT, 10'000},
  };
  for (const Option& option : options) {
    if (::setsockopt(fd, option.level, option.name, &option.value, sizeof option.value) != 0)
      return system_error("setsockopt data connection");
  }
  return ok();
}

int wait_for(int fd, short events, Deadline deadline) {
  for (;;) {
    const auto left = std::chrono::ceil<milliseconds>(deadline - steady_clock::now()).count();
    if (left <= 0) return ETIMEDOUT;
    pollfd entry{fd, events, 0};
    const int count = ::poll(&entry, 1, static_cast<int>(std::min<int64_t>(left, 60'000)));
    if (count > 0) return 0;
    if (count < 0 && errno != EINTR) return errno;
  }
}

Result<UniqueFd> connect_socket(const SocketAddress& address, Deadline deadline) {
  UniqueFd fd(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return system_error("socket");
  if (address.storage.ss_family != AF_UNIX) {
    if (Status set = set_tcp_options(fd.get()); !set) return set.error();
  }
  for (;;) {
    if (::connect(fd.get(), address.get(), address.length) == 0) return fd;
    if (errno == EINPROGRESS || errno == EINTR) break;
    // A unix listener whose queue is full returns EAGAIN, and there is no event to wait for.
    if (errno != EAGAIN || steady_clock::now() >= deadline)
      return system_error("connect data connection", errno == EAGAIN ? ETIMEDOUT : errno);
    std::this_thread::sleep_for(milliseconds(2));
  }
  if (const int error = wait_for(fd.get(), POLLOUT, deadline))
    return system_error("connect data connection", error);
  int error = 0;
  socklen_t length = sizeof error;
  if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length) != 0)
    return system_error("getsockopt SO_ERROR");
  if (error) return system_error("connect data connection", error);
  return fd;
}

Status send_exactly(int fd, std::span<const std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t count = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count >= 0) {
      bytes = bytes.subspan(static_cast<size_t>(count));
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return system_error("send hello");
    if (const int error = wait_for(fd, POLLOUT, deadline)) return system_error("send hello", error);
  }
  return ok();
}

Status receive_exactly(int fd, std::span<std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t count = ::recv(fd, bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (count > 0) {
      bytes = bytes.subspan(static_cast<size_t>(count));
      continue;
    }
    if (count == 0) return Error{ErrorCode::kDisconnected, 0, "peer closed before its hello reply"};
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return system_error("receive hello reply");
    if (const int error = wait_for(fd, POLLIN, deadline)) return system_error("receive hello reply", error);
  }
  return ok();
}

}  // namespace vmigrate::transport

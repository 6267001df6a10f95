#pragma once

#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <span>
#include <string>

#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

using Deadline = std::chrono::steady_clock::time_point;

/// An address as socket calls take it, for either family.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

/// `host` is an IPv4 or IPv6 address; names are not looked up.
Result<SocketAddress> tcp_socket_address(const Address& address);
/// `host` is a path, which must be shorter than sockaddr_un's.
Result<SocketAddress> unix_socket_address(const std::string& path);

/// Disables delay. Detects a peer that vanished without a word within about ten seconds.
Status set_tcp_options(int fd);

/// The socket is non-blocking and close-on-exec. Waits until it is connected.
Result<UniqueFd> connect_socket(const SocketAddress& address, Deadline deadline);

/// Returns 0 when `fd` has one of `events` (or an error that can be read from it), ETIMEDOUT, or poll's
/// errno.
int wait_for(int fd, short events, Deadline deadline);

Status send_exactly(int fd, std::span<const std::byte> bytes, Deadline deadline);
Status receive_exactly(int fd, std::span<std::byte> bytes, Deadline deadline);

}  // namespace vmigrate::transport

#pragma once

#include <sys/socket.h>

#include <memory>
#include <span>

#include "base/unique_fd.hpp"
#include "transport/tls.hpp"

namespace vmigrate::transport {

/// A connected socket, whose bytes are encrypted once it was given a Tls. Nothing here waits.
class SocketStream {
 public:
  explicit SocketStream(UniqueFd socket) : socket_(std::move(socket)) {}

  int get() const { return socket_.get(); }
  /// From here on. The handshake must be done before anything is sent or received.
  void encrypt(std::unique_ptr<Tls> tls) { tls_ = std::move(tls); }
  bool is_encrypted() const { return tls_ != nullptr; }
  void reset() {
    tls_.reset();
    socket_.reset();
  }

  // As recv() and sendmsg() with MSG_DONTWAIT and MSG_NOSIGNAL. `flags` count without encryption only.
  ssize_t receive(std::span<std::byte> out) {
    return tls_ != nullptr ? tls_->receive(out) : ::recv(socket_.get(), out.data(), out.size(), MSG_DONTWAIT);
  }
  ssize_t send(const msghdr& message, int flags = 0) {
    if (tls_ != nullptr) return send_encrypted(message);
    return ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT | flags);
  }
  /// After a receive() of `count` bytes for which there was more room: whether another one finds nothing, so
  /// that the socket tells when more has come.
  bool is_empty() const { return tls_ == nullptr || tls_->is_drained(); }

 private:
  ssize_t send_encrypted(const msghdr& message) {
    ssize_t sent = 0;
    for (size_t i = 0; i < message.msg_iovlen; ++i) {
      const iovec& part = message.msg_iov[i];
      const std::span bytes(static_cast<const std::byte*>(part.iov_base), part.iov_len);
      const ssize_t count = tls_->send(bytes);
      // What was sent counts; the next call meets the error again.
      if (count < 0) return sent > 0 ? sent : count;
      sent += count;
      if (static_cast<size_t>(count) < bytes.size()) break;
    }
    return sent;
  }

  UniqueFd socket_;
  std::unique_ptr<Tls> tls_;
};

}  // namespace vmigrate::transport

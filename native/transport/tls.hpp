#pragma once

#include <sys/types.h>

#include <memory>
#include <span>

#include "base/result.hpp"
#include "transport/proof.hpp"
#include "transport/socket.hpp"

struct ssl_st;

namespace vmigrate::transport {

/// TLS 1.3 over a socket, after a hello that has ended well. Both ends have the same key, and nothing else
/// opens the connection: no certificates, no tickets, no older version. The handshake brings fresh keys, so
/// that whoever learns the token later cannot read what he has recorded. One thread at a time.
class Tls {
 public:
  /// Begins on `fd`, which must outlive the object; nothing is sent yet. `end` is the own one; the target is
  /// the client. kUnsupported: the library lacks something, or the process would die of SIGPIPE (libssl
  /// cannot send without it).
  static Result<std::unique_ptr<Tls>> create(int fd, End end, const FrameKey& key);
  ~Tls();
  Tls(const Tls&) = delete;
  Tls& operator=(const Tls&) = delete;

  /// 0: the handshake is done. POLLIN, POLLOUT: wait for that and call again. -1: it has failed.
  int handshake();
  /// As recv() and send() without waiting: -1 with EAGAIN, EPROTO (what came is not from the peer) or the
  /// socket's errno. receive() returns at most one record.
  ssize_t receive(std::span<std::byte> out);
  ssize_t send(std::span<const std::byte> bytes);
  /// Whether the last receive() has found nothing more: then only the socket says when to call it again.
  bool is_drained() const { return is_drained_; }

 private:
  explicit Tls(ssl_st* ssl) : ssl_(ssl) {}
  ssize_t failed(int result);

  ssl_st* const ssl_;
  bool is_drained_ = true;
  uint64_t record_count_ = 0;  ///< sent with the current key
};

/// The whole handshake, on the thread that connects. kDisconnected, kTimeout.
Status shake_hands(Tls& tls, int fd, Deadline deadline);

}  // namespace vmigrate::transport

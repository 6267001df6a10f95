#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "transport/limits.hpp"
#include "transport/memory_access.hpp"
#include "transport/stream/served_connection.hpp"

namespace vmigrate::transport {

class StreamListener;

struct ExposedKey {
  uint64_t key = 0;
  Access access = Access::kRead;
  MemoryAccess memory;
  UniqueFd passed_fd;  ///< shm: the descriptor for the peer, opened with no more rights than the key grants
};

/// The differences between providers that serve a session over a stream socket.
struct StreamService {
  ServedConnection::Serve serve;
  /// Checks and completes a key that is about to be exposed.
  Status (*prepare)(ExposedKey& key);
  bool tcp;
  /// The strongest security that `serve` knows.
  Security security_max = Security::kNone;
};

/// A session's keys and connections. Serving threads look keys up without a lock; other calls are rare and
/// take one.
class ServedSession final : public ExposedSession {
 public:
  ServedSession(StreamListener& listener, const StreamService& service, const Credentials& credentials,
                MessageHandler handler, void* context);
  ~ServedSession() override;

  Result<RemoteKey> expose(const LocalMemory& memory, Access access) override;
  PostStatus send(Channel channel, std::span<const std::byte> message) override;
  ExposedSessionCounters counters() const override;

  const Credentials& credentials() const { return credentials_; }
  /// The least that a connection must ask for.
  Security security_min() const {
    return service_.security_max == Security::kNone ? Security::kNone : credentials_.security;
  }
  /// Called by the accept thread: takes over a connection whose hello was right. kOk: the serving thread
  /// answers. Otherwise the caller answers if `socket` is still valid; if a thread could not start, the
  /// socket was closed with it.
  wire::HelloStatus adopt(UniqueFd& socket, const Admission& admission);
  /// Serving threads. nullptr: there is no such key in this session.
  const ExposedKey* find(uint64_t key) const;
  void deliver(Channel channel, std::span<const std::byte> message) const {
    if (handler_) handler_(context_, channel, message);
  }

 private:
  void reap_finished();

  StreamListener& listener_;
  const StreamService& service_;
  const Credentials credentials_;
  const MessageHandler handler_;
  void* const context_;

  // Only grows: entries below key_count_ never change.
  std::array<ExposedKey, kKeysMax> keys_;
  std::atomic<size_t> key_count_{0};

  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<ServedConnection>> connections_;  ///< oldest first
  ExposedSessionCounters reaped_;                               ///< sums over connections that are gone
};

}  // namespace vmigrate::transport

#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/unique_fd.hpp"
#include "transport/limits.hpp"
#include "transport/transport.hpp"
#include "transport/verbs/connection.hpp"
#include "transport/verbs/frames.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/options.hpp"

namespace vmigrate::transport {

class VerbsListener;

/// A session's protection domain, registrations and connections. A thread of its own answers frames; it
/// sleeps while the device serves READs. Everything in the protection domain is destroyed with the session.
class VerbsSession final : public ExposedSession {
 public:
  static Result<std::unique_ptr<VerbsSession>> start(VerbsListener& listener, ibv_context* device,
                                                     const DeviceTraits& traits,
                                                     const Credentials& credentials,
                                                     const VerbsOptions& options, MessageHandler handler,
                                                     void* context);
  ~VerbsSession() override;

  Result<RemoteKey> expose(const LocalMemory& memory, Access access) override;
  PostStatus send(Channel channel, std::span<const std::byte> message) override;
  ExposedSessionCounters counters() const override;

  const Credentials& credentials() const { return credentials_; }
  /// Called on the listener's thread: takes over a connection request whose hello was right. kOk: accepted.
  /// Otherwise `id` may still be valid, and the caller must reject it.
  wire::HelloStatus adopt(CmId& id, const VerbsConnection::Request& request);

 private:
  struct Key {
    uint64_t key = 0;
    Access access = Access::kRead;
    std::unique_ptr<RegisteredMemory> memory;
  };
  struct Message {
    Channel channel{};
    size_t length_bytes = 0;
    std::array<std::byte, wire::kMessageBytesMax> bytes;
  };

  VerbsSession(VerbsListener& listener, const DeviceTraits& traits, const Credentials& credentials,
               const VerbsOptions& options, MessageHandler handler, void* context);
  void run();
  void sleep();
  void take_completion_events();
  bool take_message(Message* message);
  void answer_map(VerbsConnection& connection, const VerbsMap& question);
  const Key* find(uint64_t key) const;
  void reap_lost();

  VerbsListener& listener_;
  const DeviceTraits traits_;
  const Credentials credentials_;
  const VerbsOptions options_;
  const MessageHandler handler_;
  void* const context_;

  UniqueFd wake_;  ///< signalled by stop, by a lost connection, and by send() if it found a frame
  ProtectionDomain pd_;
  CompletionChannel completions_;
  std::mutex expose_mutex_;  ///< taken before mutex_: registering takes long and must not hold up the others

  mutable std::mutex mutex_;
  std::vector<Key> keys_;
  std::vector<std::unique_ptr<VerbsConnection>> connections_;  ///< oldest first

  std::atomic<bool> stop_{false};
  clockid_t cpu_clock_{};
  std::thread thread_;
};

}  // namespace vmigrate::transport

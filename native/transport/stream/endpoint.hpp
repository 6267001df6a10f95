#pragma once

#include <chrono>
#include <memory>

#include "transport/hello.hpp"
#include "transport/local_memories.hpp"
#include "transport/operation_table.hpp"
#include "transport/ready_signal.hpp"
#include "transport/socket.hpp"
#include "transport/stream/send_queue.hpp"
#include "transport/stream/socket_stream.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// The requester's side of a stream socket: the part that is the same for all stream providers. Frames leave
/// through `queue_`, and arrived messages wait in `received_`. The derived class handles all other frames.
class StreamEndpoint : public Endpoint, protected SendQueue::Owner {
 public:
  Status open();

  Result<LocalId> register_local(const LocalMemory& memory) final { return memories_.add(memory); }
  PostResult read(std::span<const Operation> operations) final {
    return post(OperationTable::Kind::kRead, operations);
  }
  PostResult write(std::span<const Operation> operations) final {
    return post(OperationTable::Kind::kWrite, operations);
  }
  PostStatus send(std::span<const std::byte> message) final;
  size_t receive(std::span<std::byte> out) final;
  bool disconnected() const final { return disconnected_; }
  int event_fd() const final { return ready_.fd(); }

 protected:
  StreamEndpoint(SocketStream socket, bool with_payloads, std::unique_ptr<FrameTags> sent_tags)
      : socket_(std::move(socket)), queue_(with_payloads, std::move(sent_tags)) {}

  virtual PostResult post(OperationTable::Kind kind, std::span<const Operation> operations) = 0;
  /// Reads what has arrived, and puts messages into `received_`.
  virtual void receive_some() = 0;
  /// Whether poll() would make progress without new data from the socket.
  virtual bool can_move_on() const { return false; }

  void flush() {
    if (!queue_.empty() && !disconnected_) flush_queue();
  }
  void disconnect(int system_errno);
  /// Stays readable for ever once disconnected, because the owner must not miss that.
  void update_ready() {
    ready_.set(disconnected_ || table_.has_completions() || !received_.empty() || can_move_on());
  }

  SocketStream socket_;
  LocalMemories memories_;
  OperationTable table_;
  SendQueue queue_;
  MessageRing received_;
  bool disconnected_ = false;

 private:
  void flush_queue();

  ReadySignal ready_;
};

/// A socket needs only its address, so there are no options.
inline constexpr Error kNoOptions{ErrorCode::kInvalidArgument, 0, "provider without options"};

/// Connects, says hello and makes a `Made` of the socket. `security_max`: the strongest that a `Made` knows.
template <typename Made>
Result<std::unique_ptr<Endpoint>> connect_stream(const Result<SocketAddress>& address,
                                                 const Credentials& credentials, Channel channel,
                                                 std::chrono::milliseconds timeout, Security security_max) {
  const Deadline deadline = std::chrono::steady_clock::now() + timeout;
  const Security security = security_max == Security::kNone ? Security::kNone : credentials.security;
  if (security > security_max)
    return Error{ErrorCode::kUnsupported, 0, "this build has no such security of data connections"};
  if (!address) return address.error();
  auto socket = connect_socket(address.value(), deadline);
  if (!socket) return socket.error();
  const auto agreed = say_hello(socket.value().get(), credentials, channel, security, deadline);
  if (!agreed) return agreed.error();
  auto tags =
      ConnectionTags::create(agreed.value().security, agreed.value().target_key, agreed.value().source_key);
  if (!tags) return tags.error();
  SocketStream stream(std::move(socket).value());
  if (agreed.value().security == Security::kEncrypt) {
    auto tls = Tls::create(stream.get(), End::kTarget, agreed.value().target_key);
    if (!tls) return tls.error();
    if (Status shaken = shake_hands(*tls.value(), stream.get(), deadline); !shaken) return shaken.error();
    stream.encrypt(std::move(tls).value());
  }
  auto endpoint = std::make_unique<Made>(std::move(stream), std::move(tags).value());
  if (Status opened = endpoint->open(); !opened) return opened.error();
  return std::unique_ptr<Endpoint>(std::move(endpoint));
}

}  // namespace vmigrate::transport

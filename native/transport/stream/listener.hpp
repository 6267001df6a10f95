#pragma once

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "transport/stream/hello_gate.hpp"
#include "transport/stream/served_session.hpp"

namespace vmigrate::transport {

/// Listener over a stream socket, tcp or unix. One thread accepts, reads hellos and passes the connection to
/// its session. Lock order: this registry before a session.
class StreamListener final : public Listener, private HelloGate::Owner {
 public:
  /// `unlink_path`: file to remove when the listener is destroyed; empty for tcp.
  static Result<std::unique_ptr<Listener>> start(UniqueFd socket, const Address& address,
                                                 const StreamService& service, std::string unlink_path);
  /// The listener's sessions must be destroyed before it.
  ~StreamListener() override;

  Result<std::unique_ptr<ExposedSession>> expose_session(const Credentials& credentials,
                                                         MessageHandler handler, void* context) override;
  Address address() const override { return address_; }
  uint64_t rejected_hellos() const override { return gate_.rejected_hellos(); }

  /// Called when the session is being destroyed. When this returns, no thread of the listener knows the
  /// session any more.
  void forget(ServedSession& session);

 private:
  StreamListener(UniqueFd socket, UniqueFd wake, const Address& address, const StreamService& service,
                 std::string unlink_path);
  wire::HelloStatus admit(const Transcript& transcript, std::span<const uint8_t> proof,
                          UniqueFd& socket) override;
  wire::HelloStatus admit_old(const wire::OldHello& hello, UniqueFd& socket) override;

  const Address address_;
  const StreamService& service_;
  const std::string unlink_path_;
  std::mutex mutex_;
  std::vector<ServedSession*> sessions_;
  HelloGate gate_;
  std::thread thread_;
};

}  // namespace vmigrate::transport

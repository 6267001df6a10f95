#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/unique_fd.hpp"
#include "transport/verbs/challenge_table.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/options.hpp"
#include "transport/verbs/session.hpp"

namespace vmigrate::transport {

/// Listener over rdma_cm. The hello comes with the connection request. The first one is rejected, with the
/// challenge; the peer answers it with another request. So a peer is known before anything is set up for it.
/// One thread takes the connection manager's events, for all sessions. Lock order: this registry before a
/// session.
class VerbsListener final : public Listener {
 public:
  static Result<std::unique_ptr<Listener>> start(const Address& address, const VerbsOptions& options);
  /// The listener's sessions must be destroyed before it.
  ~VerbsListener() override;

  Result<std::unique_ptr<ExposedSession>> expose_session(const Credentials& credentials,
                                                         MessageHandler handler, void* context) override;
  Address address() const override { return address_; }
  uint64_t rejected_hellos() const override { return rejected_hellos_.load(std::memory_order_relaxed); }
  bool fills_holes() const override { return true; }
  bool lost() const override { return lost_.load(std::memory_order_relaxed); }

  /// Called when the session is being destroyed. When this returns, no thread of the listener knows the
  /// session any more.
  void forget(VerbsSession& session);

 private:
  VerbsListener(const Address& address, const VerbsOptions& options) : address_(address), options_(options) {}
  Status open();
  void run();
  void take_events();
  void handle_request(CmId id, const wire::Hello& hello, const rdma_conn_param& parameters);
  wire::HelloReply answer(CmId& id, const wire::Hello& hello, const VerbsConnection::Request& request);
  wire::HelloStatus admit(CmId& id, const wire::Hello& hello, VerbsConnection::Request request);
  wire::HelloStatus admit_old(CmId& id, const wire::OldHello& hello, VerbsConnection::Request request);

  Address address_;
  const VerbsOptions options_;
  ChallengeTable challenges_;  ///< of the thread alone
  UniqueFd wake_;
  EventChannel event_channel_;
  CmId id_;
  DeviceTraits traits_;
  std::atomic<uint64_t> rejected_hellos_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> lost_{false};

  std::mutex mutex_;
  std::vector<VerbsSession*> sessions_;
  std::thread thread_;
};

}  // namespace vmigrate::transport

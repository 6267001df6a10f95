#pragma once

#include <array>
#include <memory>
#include <vector>

#include "transport/hello.hpp"
#include "transport/message_ring.hpp"
#include "transport/operation_table.hpp"
#include "transport/ready_signal.hpp"
#include "transport/socket.hpp"
#include "transport/transport.hpp"
#include "transport/verbs/keys.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/messages.hpp"
#include "transport/verbs/objects.hpp"
#include "transport/verbs/options.hpp"

namespace vmigrate::transport {

/// The requester's side of a reliable-connected queue pair. connect.cpp sets it up, datapath.cpp posts and
/// polls, wakeup.cpp decides when the owner may sleep and what wakes it.
///
/// More READs than the devices agreed on may be posted: the device holds the others back in its send queue,
/// in order. Requests complete in the order of posting, so most of them need no completion of their own:
/// `in_flight_` holds that order.
class VerbsEndpoint final : public Endpoint {
 public:
  static Result<std::unique_ptr<Endpoint>> connect(const Address& address, const Credentials& credentials,
                                                   Channel channel, Deadline deadline,
                                                   const VerbsOptions& options);
  ~VerbsEndpoint() override;

  Result<LocalId> register_local(const LocalMemory& memory) override;
  PostResult read(std::span<const Operation> operations) override;
  PostResult write(std::span<const Operation> operations) override;
  size_t poll(std::span<Completion> out) override;
  PostStatus send(std::span<const std::byte> message) override;
  size_t receive(std::span<std::byte> out) override;
  bool disconnected() const override { return disconnected_; }
  int event_fd() const override { return ready_.fd(); }
  bool is_device() const override { return true; }
  void set_polled(bool polled) override;

 private:
  explicit VerbsEndpoint(Channel channel);

  // connect.cpp
  Status resolve(const Address& address, const VerbsOptions& options, Deadline deadline);
  Status create_queues();
  Status ask_for_challenge(Greeting& greeting, Deadline deadline);
  Status say_hello(std::span<const std::byte> hello, const VerbsOptions& options, Deadline deadline,
                   wire::HelloReply* reply);
  Status wait_event(rdma_cm_event_type wanted, Deadline deadline, wire::HelloReply* reply = nullptr);

  // datapath.cpp
  PostResult post(OperationTable::Kind kind, std::span<const Operation> operations);
  void start(uint8_t slot, const RemoteKeys::Entry& key);
  void start_waiting(const RemoteKeys::Entry& key, OpResult result);
  void chain_frame(std::span<const std::byte> header, std::span<const std::byte> body);
  void chain_request(ibv_send_wr& request, const ibv_sge& element);
  void flush_chain();
  void ask_for_keys();
  void progress();
  void drain_sends();
  void drain_receives();
  void complete_through(uint64_t sequence);
  void fail(const ibv_wc& failure);
  void take_frames();
  void disconnect(int system_errno);

  // wakeup.cpp
  bool has_news() const;
  void update_ready();
  void rest();
  void look_at_descriptors();

  static constexpr size_t kPiecesMax = 3;  ///< of an operation: two chunk borders, one on either side
  static constexpr uint32_t kSendQueueEntries =
      kPiecesMax * wire::kOutstandingOpsMax + MessageBuffers::kSendCount;
  static constexpr size_t kChainMax = 32;
  static constexpr size_t kInFlightMax = 128;
  /// A poll() that finds nothing checks the descriptors this often, so that an owner that never sleeps also
  /// notices a lost connection.
  static constexpr uint32_t kEmptyPollsPerLook = 64;
  static_assert(kInFlightMax >= wire::kOutstandingOpsMax + MessageBuffers::kSendCount);

  /// One operation or frame in the send queue, until its last request is known to be done.
  struct InFlight {
    bool is_frame = false;
    uint8_t index = 0;  ///< slot in table_, or send buffer
  };

  const Channel channel_;
  // Declared in the order of dependence.
  EventChannel event_channel_;
  CmId id_;
  std::shared_ptr<RequesterDomain> domain_;
  std::vector<std::shared_ptr<const RegisteredMemory>> locals_;
  CompletionChannel completion_channel_;
  CompletionQueue send_cq_;
  CompletionQueue receive_cq_;
  MessageBuffers messages_;
  QueuePair qp_;
  uint32_t inline_bytes_max_ = 0;

  OperationTable table_;
  size_t waiting_count_ = 0;  ///< operations in kPosted, whose key is not open yet
  RemoteKeys keys_;
  MessageRing received_;
  bool disconnected_ = false;

  // The requests of one call, posted to the device together.
  std::array<ibv_send_wr, kChainMax> chain_;
  std::array<ibv_sge, kChainMax> chain_elements_;
  size_t chain_count_ = 0;
  uint32_t unsignalled_count_ = 0;

  std::array<InFlight, kInFlightMax> in_flight_;
  uint64_t first_sequence_ = 0;  ///< of the oldest entry of in_flight_
  uint64_t next_sequence_ = 0;

  ReadySignal ready_;
  bool polled_ = false;
  bool send_armed_ = false;     ///< the next completion raises an event on the completion channel
  bool receive_armed_ = false;  ///< the same for the receive queue
  bool event_due_ = false;      ///< an event was raised, or will be, and nobody has taken it
  uint32_t empty_polls_ = 0;
};

}  // namespace vmigrate::transport

#pragma once

#include <memory>

#include "transport/local_memories.hpp"
#include "transport/operation_table.hpp"
#include "transport/ready_signal.hpp"
#include "transport/stream/send_queue.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// The requester's side of a tcp connection. endpoint.cpp sets it up, datapath.cpp moves bytes.
///
/// What arrives lands in `staging_` and goes from there into local memory; a reply is believed only if it
/// answers an operation that was sent, with the length that was asked for. Anything else ends the connection.
class TcpEndpoint final : public Endpoint, private SendQueue::Owner {
 public:
  explicit TcpEndpoint(UniqueFd socket);
  Status open();

  Result<LocalId> register_local(const LocalMemory& memory) override { return memories_.add(memory); }
  PostResult read(std::span<const Operation> operations) override;
  PostResult write(std::span<const Operation> operations) override;
  size_t poll(std::span<Completion> out) override;
  PostStatus send(std::span<const std::byte> message) override;
  size_t receive(std::span<std::byte> out) override;
  bool disconnected() const override { return disconnected_; }
  int event_fd() const override { return ready_.fd(); }

 private:
  /// What the next bytes of the stream are.
  enum class Expect : uint8_t { kHeader = 1, kPayload, kMessage };

  PostResult post(OperationTable::Kind kind, std::span<const Operation> operations);
  void flush();
  void receive_some();
  void parse();
  bool accept_header(const wire::FrameHeader& header);
  bool take_payload();
  bool take_message();
  void disconnect(int system_errno);
  void update_ready();
  bool load_payload(uint8_t slot, std::span<std::byte> out) override;
  void frame_sent(uint8_t slot) override;

  size_t staged_bytes() const { return staging_end_ - staging_begin_; }

  UniqueFd socket_;
  ReadySignal ready_;
  LocalMemories memories_;
  OperationTable table_;
  SendQueue queue_{true};
  MessageRing received_;
  bool disconnected_ = false;

  std::unique_ptr<std::byte[]> staging_;
  size_t staging_begin_ = 0;
  size_t staging_end_ = 0;
  Expect expect_ = Expect::kHeader;
  uint32_t message_bytes_ = 0;    ///< kMessage: its length
  uint8_t payload_slot_ = 0;      ///< kPayload: whose bytes come
  uint32_t payload_done_ = 0;     ///< kPayload: bytes dealt with
  AccessResult payload_outcome_;  ///< kPayload: first failure to store them; the rest is dropped
};

}  // namespace vmigrate::transport

#pragma once

#include <memory>

#include "transport/stream/endpoint.hpp"

namespace vmigrate::transport {

/// The requester's side of a connection whose source answers in frames.
///
/// Data arrives in `staging_` and goes from there into local memory. A reply is accepted only if it answers
/// an operation that was sent, with the length that was asked for. Anything else ends the connection. With
/// tags, an operation completes and a message is passed on only after the tag of its frame was right. Bytes
/// of a wrong frame may be in local memory then, but their operation completes with kDisconnected.
class TcpEndpoint final : public StreamEndpoint {
 public:
  TcpEndpoint(SocketStream socket, ConnectionTags tags);
  size_t poll(std::span<Completion> out) override;

 private:
  /// What the next bytes of the stream contain.
  enum class Expect : uint8_t { kHeader = 1, kPayload, kOutcome, kMessage };

  PostResult post(OperationTable::Kind kind, std::span<const Operation> operations) override;
  void receive_some() override;
  // libssl has taken bytes from the socket that we have not: the socket does not tell of these.
  bool can_move_on() const override { return !received_.full() && !socket_.is_empty(); }
  void parse();
  bool accept_header(const wire::FrameHeader& header);
  bool take_payload();
  bool take_outcome();
  bool take_message();
  bool tag_is_right();
  bool load_payload(uint8_t slot, std::span<std::byte> out) override;
  void frame_sent(uint8_t slot) override;

  size_t staged_bytes() const { return staging_end_ - staging_begin_; }

  std::unique_ptr<std::byte[]> staging_;
  size_t staging_begin_ = 0;
  size_t staging_end_ = 0;
  Expect expect_ = Expect::kHeader;
  uint32_t message_bytes_ = 0;  ///< kMessage: length of the message
  uint8_t reply_slot_ = 0;      ///< kPayload, kOutcome: slot of the operation that is being answered
  uint32_t payload_done_ = 0;   ///< kPayload: bytes handled so far
  AccessResult reply_outcome_;  ///< kPayload: first failure to store them, the rest is dropped; kOutcome
  const std::unique_ptr<FrameTags> tags_;  ///< of what arrives; null without integrity
  const size_t tag_bytes_;
};

}  // namespace vmigrate::transport

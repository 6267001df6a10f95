#pragma once

#include <memory>

#include "transport/stream/endpoint.hpp"

namespace vmigrate::transport {

/// The requester's side of a connection whose source answers in frames.
///
/// Data arrives in `staging_` and goes from there into local memory. A reply is accepted only if it answers
/// an operation that was sent, with the length that was asked for. Anything else ends the connection.
class TcpEndpoint final : public StreamEndpoint {
 public:
  explicit TcpEndpoint(UniqueFd socket);
  size_t poll(std::span<Completion> out) override;

 private:
  /// What the next bytes of the stream contain.
  enum class Expect : uint8_t { kHeader = 1, kPayload, kMessage };

  PostResult post(OperationTable::Kind kind, std::span<const Operation> operations) override;
  void receive_some() override;
  void parse();
  bool accept_header(const wire::FrameHeader& header);
  bool take_payload();
  bool take_message();
  bool load_payload(uint8_t slot, std::span<std::byte> out) override;
  void frame_sent(uint8_t slot) override;

  size_t staged_bytes() const { return staging_end_ - staging_begin_; }

  std::unique_ptr<std::byte[]> staging_;
  size_t staging_begin_ = 0;
  size_t staging_end_ = 0;
  Expect expect_ = Expect::kHeader;
  uint32_t message_bytes_ = 0;    ///< kMessage: length of the message
  uint8_t payload_slot_ = 0;      ///< kPayload: slot of the operation whose bytes come
  uint32_t payload_done_ = 0;     ///< kPayload: bytes handled so far
  AccessResult payload_outcome_;  ///< kPayload: first failure to store them; the rest is dropped
};

}  // namespace vmigrate::transport

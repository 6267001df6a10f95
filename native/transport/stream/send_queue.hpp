#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "transport/message_ring.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// Frames to be sent over a non-blocking socket, in order. Consecutive frames leave in one call. Fixed size.
/// Not thread-safe.
class SendQueue {
 public:
  /// The functions that the queue needs from its endpoint.
  class Owner {
   public:
    virtual ~Owner() = default;
    /// Loads a WRITE's bytes. False: the owner has completed the operation, and the frame is dropped.
    virtual bool load_payload(uint8_t slot, std::span<std::byte> out) = 0;
    /// The frame of `slot` was sent.
    virtual void frame_sent(uint8_t slot) = 0;
  };
  enum class Outcome : uint8_t { kEmpty = 1, kBlocked, kBroken };

  explicit SendQueue(bool with_payloads) {
    // Never touched if no WRITE is posted, so it then costs only address space.
    if (with_payloads) payload_ = std::make_unique_for_overwrite<std::byte[]>(wire::kTransferBytesMax);
  }

  bool empty() const { return count_ == 0; }
  bool message_room() const { return !messages_.full(); }
  void push_operation(const wire::FrameHeader& header, uint8_t slot);
  /// Requires message_room().
  void push_message(std::span<const std::byte> message);
  /// Sends until the queue is empty or the socket is full. kBroken: errno gives the reason.
  Outcome flush(int fd, Owner& owner);
  void clear();

 private:
  enum class Kind : uint8_t { kPlain = 1, kPayload, kMessage };
  struct Item {
    Kind kind = Kind::kPlain;
    uint8_t slot = 0;
    bool loaded = false;
  };
  static constexpr size_t kItemsMax = wire::kOutstandingOpsMax + kMessagesQueuedMax;

  void push(const wire::FrameHeader& header, Item item);
  void advance(size_t sent_bytes, Owner& owner);
  void pop();
  size_t body_bytes(size_t index) const;

  // headers_ is separate from items_, so that consecutive headers leave as one piece.
  std::array<wire::FrameHeader, kItemsMax> headers_;
  std::array<Item, kItemsMax> items_;
  size_t first_ = 0;
  size_t count_ = 0;
  size_t first_sent_bytes_ = 0;  ///< of the first frame
  MessageRing messages_;
  std::unique_ptr<std::byte[]> payload_;  ///< of the first frame, once loaded
};

}  // namespace vmigrate::transport

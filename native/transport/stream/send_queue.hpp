#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "transport/message_ring.hpp"
#include "transport/stream/frame_tags.hpp"
#include "transport/stream/socket_stream.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// Frames to be sent over a socket, in order. Consecutive frames leave in one call. Fixed size.
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

  /// `tags` make the tags of the frames; nullptr: they have none.
  SendQueue(bool with_payloads, std::unique_ptr<FrameTags> tags)
      : tags_(std::move(tags)), tag_bytes_(tags_ != nullptr ? wire::kFrameTagBytes : 0) {
    // Never touched if no WRITE is posted, so it then costs only address space.
    if (with_payloads) payload_ = std::make_unique_for_overwrite<std::byte[]>(wire::kTransferBytesMax);
  }

  bool empty() const { return count_ == 0; }
  bool message_room() const { return !messages_.full(); }
  void push_operation(const wire::FrameHeader& header, uint8_t slot);
  /// Requires message_room().
  void push_message(std::span<const std::byte> message);
  /// Sends until the queue is empty or the socket is full. kBroken: errno gives the reason.
  Outcome flush(SocketStream& socket, Owner& owner);
  void clear();

 private:
  enum class Kind : uint8_t { kPlain = 1, kPayload, kMessage };
  struct Item {
    Kind kind = Kind::kPlain;
    uint8_t slot = 0;
    bool ready = false;  ///< the body is loaded and the tag is made: the frame will be sent
    uint32_t body_bytes = 0;
  };
  static constexpr size_t kItemsMax = wire::kOutstandingOpsMax + kMessagesQueuedMax;

  void push(const wire::FrameHeader& header, Item item);
  void advance(size_t sent_bytes, Owner& owner);
  void pop();
  bool make_ready(size_t index, Owner& owner);
  /// The header, and behind it the tag.
  std::byte* head_of(size_t index) {
    return heads_.data() + index * (sizeof(wire::FrameHeader) + tag_bytes_);
  }
  const std::byte* body_of(size_t index) const;
  size_t frame_bytes(size_t index) const {
    return sizeof(wire::FrameHeader) + items_[index].body_bytes + tag_bytes_;
  }

  const std::unique_ptr<FrameTags> tags_;
  const size_t tag_bytes_;
  bool broken_ = false;  ///< libcrypto failed
  // heads_ is separate from items_ and dense, so that consecutive frames without a body leave as one piece.
  std::array<std::byte, kItemsMax*(sizeof(wire::FrameHeader) + wire::kFrameTagBytes)> heads_;
  std::array<Item, kItemsMax> items_;
  size_t first_ = 0;
  size_t count_ = 0;
  size_t first_sent_bytes_ = 0;  ///< of the first frame
  MessageRing messages_;
  std::unique_ptr<std::byte[]> payload_;  ///< of the first frame, once loaded
};

}  // namespace vmigrate::transport

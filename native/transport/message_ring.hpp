#pragma once

#include <array>
#include <cstddef>
#include <cstring>
#include <optional>
#include <span>

#include "base/check.hpp"
#include "transport/limits.hpp"

namespace vmigrate::transport {

/// Small messages waiting to be taken, oldest first. Fixed size; not thread-safe.
class MessageRing {
 public:
  bool empty() const { return count_ == 0; }
  bool full() const { return count_ == kMessagesQueuedMax; }

  /// The ring must not be full. At most wire::kMessageBytesMax.
  void push(std::span<const std::byte> message) {
    VMG_CHECK(!full() && message.size() <= wire::kMessageBytesMax);
    Message& slot = messages_[(first_ + count_) % kMessagesQueuedMax];
    std::memcpy(slot.bytes.data(), message.data(), message.size());
    slot.length_bytes = message.size();
    ++count_;
  }
  /// Moves the oldest message into `out` and returns its length; 0 if there is none. nullopt: `out` is too
  /// small for the message, which stays.
  std::optional<size_t> take(std::span<std::byte> out) {
    if (empty()) return 0;
    const std::span<const std::byte> message = front();
    if (message.size() > out.size()) return std::nullopt;
    std::memcpy(out.data(), message.data(), message.size());
    const size_t length_bytes = message.size();
    pop();
    return length_bytes;
  }
  /// Valid until pop(). The ring must not be empty.
  std::span<const std::byte> front() const {
    VMG_CHECK(!empty());
    return {messages_[first_].bytes.data(), messages_[first_].length_bytes};
  }
  void pop() {
    VMG_CHECK(!empty());
    first_ = (first_ + 1) % kMessagesQueuedMax;
    --count_;
  }

 private:
  struct Message {
    size_t length_bytes = 0;
    std::array<std::byte, wire::kMessageBytesMax> bytes;
  };
  size_t first_ = 0;
  size_t count_ = 0;
  std::array<Message, kMessagesQueuedMax> messages_;
};

}  // namespace vmigrate::transport

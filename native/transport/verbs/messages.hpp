#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>

#include "base/check.hpp"
#include "transport/frames.hpp"
#include "transport/limits.hpp"
#include "transport/verbs/objects.hpp"

namespace vmigrate::transport {

/// Frames of one connection: buffers that the device writes arriving frames to and reads leaving ones from.
/// Every receive buffer is either posted (the device's) or in the ring of arrived ones (ours, oldest first);
/// every send buffer is either free or posted. When none is posted any more the peer's device waits and tries
/// again: that is all the flow control there is. Not thread-safe.
class MessageBuffers {
 public:
  static constexpr uint32_t kReceiveCount = 2 * kMessagesQueuedMax;
  static constexpr uint32_t kSendCount = kMessagesQueuedMax;
  static constexpr uint32_t kBufferBytes = wire::kFrameHeaderBytes + wire::kMessageBytesMax;

  MessageBuffers() = default;
  MessageBuffers(const MessageBuffers&) = delete;
  MessageBuffers& operator=(const MessageBuffers&) = delete;
  /// The queue pair must be gone.
  ~MessageBuffers();

  Status open(ibv_pd* pd);
  /// Before the connection comes up, so that the first frame finds a buffer.
  Status post_all_receives(ibv_qp* qp);

  /// A receive completed: the buffer is ours, behind those that arrived before.
  void arrived(uint64_t receive_id, uint32_t length_bytes);
  bool has_arrived() const { return arrived_count_ > 0; }
  /// The oldest frame; valid until repost_first(). Not when none has arrived.
  std::span<const std::byte> first() const;
  /// Gives its buffer back to the device. False: the queue pair is broken.
  bool repost_first(ibv_qp* qp);

  bool send_room() const { return free_send_count_ > 0; }
  /// Copies a frame into a free buffer, which is the device's until release_send(). Not without room.
  uint32_t fill_send(std::span<const std::byte> header, std::span<const std::byte> body);
  ibv_sge send_element(uint32_t buffer) const;
  void release_send(uint32_t buffer);

 private:
  struct Arrived {
    uint32_t buffer = 0;
    uint32_t length_bytes = 0;
  };
  std::byte* receive_bytes(uint32_t buffer) const { return memory_ + size_t{buffer} * kBufferBytes; }
  std::byte* send_bytes(uint32_t buffer) const { return receive_bytes(kReceiveCount + buffer); }
  int post_receive(ibv_qp* qp, uint32_t buffer) const;

  static constexpr size_t kMemoryBytes = size_t{kReceiveCount + kSendCount} * kBufferBytes;
  std::byte* memory_ = nullptr;
  MemoryRegion region_;
  std::array<Arrived, kReceiveCount> arrived_;
  uint32_t arrived_first_ = 0;
  uint32_t arrived_count_ = 0;
  std::array<uint32_t, kSendCount> free_sends_{};
  uint32_t free_send_count_ = 0;
  std::array<uint32_t, kSendCount> send_lengths_{};
};

}  // namespace vmigrate::transport

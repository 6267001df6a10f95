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

/// Frame buffers of one connection: the device writes arriving frames to receive buffers and reads outgoing
/// ones from send buffers. Every receive buffer is either posted (owned by the device) or in the ring of
/// arrived ones (owned by us, oldest first). Every send buffer is either free or posted. If no receive buffer
/// is posted, the peer's device waits and tries again; there is no other flow control. Not thread-safe.
class MessageBuffers {
 public:
  static constexpr uint32_t kReceiveCount = 2 * kMessagesQueuedMax;
  static constexpr uint32_t kSendCount = kMessagesQueuedMax;
  static constexpr uint32_t kBufferBytes = wire::kFrameHeaderBytes + wire::kMessageBytesMax;

  MessageBuffers() = default;
  MessageBuffers(const MessageBuffers&) = delete;
  MessageBuffers& operator=(const MessageBuffers&) = delete;
  /// The queue pair must be destroyed before.
  ~MessageBuffers();

  Status open(ibv_pd* pd);
  /// Call it before the connection comes up, so that the first frame finds a buffer.
  Status post_all_receives(ibv_qp* qp);

  /// Call it when a receive has completed: the buffer is then ours, behind those that arrived before.
  void arrived(uint64_t receive_id, uint32_t length_bytes);
  bool has_arrived() const { return arrived_count_ > 0; }
  /// The oldest frame, valid until repost_first(). A frame must have arrived.
  std::span<const std::byte> first() const;
  /// Returns the oldest frame's buffer to the device. False: the queue pair is broken.
  bool repost_first(ibv_qp* qp);

  bool send_room() const { return free_send_count_ > 0; }
  /// Copies a frame into a free buffer, which the device owns until release_send(). Requires a free buffer.
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

#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "multicast/datagram/address.hpp"
#include "transport/verbs/objects.hpp"

namespace vmigrate::multicast {

struct AddressHandleDeleter {
  void operator()(ibv_ah* handle) const { (void)transport::verbs().ibv.destroy_ah(handle); }
};
/// Where a datagram goes to.
using AddressHandle = std::unique_ptr<ibv_ah, AddressHandleDeleter>;

/// Whom a datagram is sent to.
struct Destination {
  ibv_ah* handle = nullptr;
  uint32_t queue_pair = 0;
  uint32_t key = 0;
};

/// Every received datagram has this much room before it for the global route header.
inline constexpr size_t kRouteHeaderBytes = 40;

/// An unreliable queue pair with its buffers. Receives are always posted ahead; a datagram that finds none is
/// lost. One thread.
class DatagramQueues {
 public:
  /// `id` is bound to a device. `datagram_bytes_max`: the longest one that can be sent or received.
  Status open(rdma_cm_id* id, size_t datagram_bytes_max);
  ibv_pd* pd() const { return pd_.get(); }
  int event_fd() const { return completions_->fd; }

  /// Copies datagrams of `datagram_bytes`, of which the last may be shorter, and posts many at once. Those
  /// for which no buffer becomes free in time are lost. An error means that the device or the queue pair is
  /// gone.
  Status send(std::span<const std::byte> bytes, size_t datagram_bytes, const Destination& to,
              std::chrono::milliseconds timeout);
  struct Arrived {
    std::span<const std::byte> datagram;
    std::span<const std::byte> route_header;  ///< empty: it has none
    uint32_t from_queue_pair = 0;
    uint16_t from_local_id = 0;
  };
  /// Calls `visit` with some datagrams that have arrived, and returns how many. If there is none, event_fd
  /// becomes readable when there is.
  template <typename Visit>
  Result<size_t> receive(Visit visit) {
    std::array<ibv_wc, kPolledMax> completions;
    auto count = poll_receives(completions);
    if (!count || count.value() == 0) return count;
    std::array<uint64_t, kPolledMax> slots;
    for (size_t i = 0; i < count.value(); ++i) {
      visit(arrived(completions[i]));
      slots[i] = completions[i].wr_id;
    }
    if (auto posted = post_receives(std::span(slots).first(count.value())); !posted) return posted.error();
    return count;
  }

 private:
  static constexpr size_t kPolledMax = 64;
  /// Requests that one call posts. Each call costs much: with Soft-RoCE it is a system call.
  static constexpr size_t kChainMax = 32;
  static constexpr uint32_t kSendsMax = 128;
  static constexpr uint32_t kReceivesMax = 2048;

  Result<size_t> poll_receives(std::span<ibv_wc> out);
  Result<size_t> poll(ibv_cq* queue, std::span<ibv_wc> out) const;
  Status arm();
  Result<bool> await_free_send(std::chrono::steady_clock::time_point deadline);
  Result<size_t> post_sends(std::span<const std::byte> bytes, size_t datagram_bytes, const Destination& to);
  /// At most kPolledMax.
  Status post_receives(std::span<const uint64_t> slots);
  Arrived arrived(const ibv_wc& completion) const;
  std::byte* slot_bytes(uint64_t slot) { return buffer_.data() + slot * slot_bytes_; }

  transport::ProtectionDomain pd_;
  transport::CompletionChannel completions_;
  transport::CompletionQueue send_cq_, receive_cq_;
  std::vector<std::byte> buffer_;  ///< receives first, then sends
  transport::MemoryRegion memory_;
  transport::QueuePair qp_;
  size_t slot_bytes_ = 0;
  uint32_t receive_count_ = 0;
  /// Sends complete in the order in which they were posted, so their buffers are a ring.
  size_t next_send_ = 0, free_sends_ = kSendsMax;
};

}  // namespace vmigrate::multicast

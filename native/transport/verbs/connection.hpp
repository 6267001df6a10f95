#pragma once

#include <atomic>
#include <memory>

#include "transport/transport.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/messages.hpp"
#include "transport/verbs/objects.hpp"
#include "transport/verbs/options.hpp"

namespace vmigrate::transport {

/// One accepted queue pair at the source. The device answers READs by itself; this class only answers an
/// occasional frame. It belongs to its session. All calls except lost() and is_lost() are made under the
/// session's lock.
class VerbsConnection {
 public:
  struct Request {
    Channel channel{};
    uint8_t reads_wanted = 0;  ///< READs that the peer would like to have outstanding
    uint8_t initiator_depth = 0;
    wire::HelloReply reply{};
    size_t reply_bytes = 0;
  };

  /// Accepts the connection. On failure the id is destroyed, and with it the peer's attempt. `wake` is
  /// written when the connection is lost; it must outlive the connection.
  static Result<std::unique_ptr<VerbsConnection>> accept(CmId& id, ibv_pd* pd, const DeviceTraits& traits,
                                                         ibv_comp_channel* completions,
                                                         const Request& request, const VerbsOptions& options,
                                                         int wake);
  ~VerbsConnection();

  Channel channel() const { return channel_; }
  /// Call it when the peer has gone. Called on the connection manager's thread; takes no lock.
  void lost();
  bool is_lost() const { return lost_.load(std::memory_order_relaxed); }

  /// Call it after an event of this connection was taken from the completion channel.
  void completion_event();
  /// Takes completed requests, and arms the queue for the next ones.
  void progress();

  bool has_frame() const { return !lost_.load(std::memory_order_relaxed) && messages_.has_arrived(); }
  std::span<const std::byte> first_frame() const { return messages_.first(); }
  void drop_first_frame();
  bool send_room() const { return messages_.send_room(); }
  void send(std::span<const std::byte> header, std::span<const std::byte> body);

 private:
  VerbsConnection(Channel channel, int wake) : channel_(channel), wake_(wake) {}

  static constexpr uint32_t kQueueEntries = MessageBuffers::kReceiveCount + MessageBuffers::kSendCount;

  const Channel channel_;
  const int wake_;
  std::atomic<bool> lost_{false};  ///< declared before the id, whose events set it until the id is gone
  CmId id_;
  CompletionQueue cq_;
  MessageBuffers messages_;
  QueuePair qp_;
  uint32_t inline_bytes_max_ = 0;
  bool armed_ = false;
};

}  // namespace vmigrate::transport

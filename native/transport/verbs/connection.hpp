#pragma once

#include <atomic>
#include <memory>

#include "transport/transport.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/messages.hpp"
#include "transport/verbs/objects.hpp"
#include "transport/verbs/options.hpp"

namespace vmigrate::transport {

/// One accepted queue pair at the source. The device answers READs by itself; what is left for us is a frame
/// now and then. Belongs to its session, under whose lock all calls are made but lost() and is_lost().
class VerbsConnection {
 public:
  struct Request {
    Channel channel{};
    uint8_t reads_wanted = 0;  ///< READs under way that the peer would like to have
    uint8_t initiator_depth = 0;
  };

  /// Accepts. On failure the id is gone, and with it the peer's attempt. `wake` is written when the
  /// connection is lost; it must outlive us.
  static Result<std::unique_ptr<VerbsConnection>> accept(CmId& id, ibv_pd* pd, const DeviceTraits& traits,
                                                         ibv_comp_channel* completions,
                                                         const Request& request, const VerbsOptions& options,
                                                         int wake);
  ~VerbsConnection();

  Channel channel() const { return channel_; }
  /// The peer has gone. The connection manager's thread: takes no lock.
  void lost();
  bool is_lost() const { return lost_.load(std::memory_order_relaxed); }

  /// An event of ours was taken from the completion channel.
  void completion_event();
  /// Takes what has completed, and arms the queue for what comes next.
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
  std::atomic<bool> lost_{false};  ///< before the id, whose events set it until it is gone
  CmId id_;
  CompletionQueue cq_;
  MessageBuffers messages_;
  QueuePair qp_;
  uint32_t inline_bytes_max_ = 0;
  bool armed_ = false;
};

}  // namespace vmigrate::transport

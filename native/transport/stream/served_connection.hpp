#pragma once

#include <sys/uio.h>
#include <time.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <thread>

#include "base/unique_fd.hpp"
#include "transport/hello.hpp"
#include "transport/message_ring.hpp"
#include "transport/stream/frame_tags.hpp"
#include "transport/stream/socket_stream.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

class ServedSession;

/// What the accept thread leaves to the serving thread.
struct Admission {
  Agreed agreed;
  wire::HelloReply reply;
  size_t reply_bytes = 0;
};

/// One accepted connection and the thread that serves it. Only that thread uses the socket; other threads use
/// stop() and post(). stop() ends any wait of the thread.
class ServedConnection {
 public:
  using Serve = void (*)(ServedConnection& connection, ServedSession& session);

  /// nullptr if the system has no thread or descriptor left. The thread answers the hello first. `session`
  /// must outlive the connection.
  static std::unique_ptr<ServedConnection> start(UniqueFd socket, const Admission& admission,
                                                 ServedSession& session, Serve serve);
  /// Stops the thread and joins it.
  ~ServedConnection();
  ServedConnection(const ServedConnection&) = delete;
  ServedConnection& operator=(const ServedConnection&) = delete;

  // Any thread.
  void stop();
  bool stopping() const { return stop_.load(std::memory_order_relaxed); }
  /// The thread no longer uses the socket or the memory; joining it does not wait.
  bool finished() const;
  PostStatus post(std::span<const std::byte> message);
  Channel channel() const { return channel_; }
  uint64_t cpu_ns() const;
  uint64_t read_count() const { return read_count_.load(std::memory_order_relaxed); }
  uint64_t read_bytes() const { return read_bytes_.load(std::memory_order_relaxed); }

  // The serving thread only.
  /// Waits for at least one byte. 0: the connection is over (peer, error or stop).
  size_t receive(std::span<std::byte> out);
  /// Sends all of `parts`, which it modifies; false: the connection is over. `more`: another send follows at
  /// once. `passed_fd` travels with the first byte (unix sockets).
  bool send(std::span<iovec> parts, bool more = false, int passed_fd = -1);
  void count_read(uint64_t bytes);
  /// Of each frame, in either direction.
  ConnectionTags& tags() { return tags_; }
  bool is_encrypted() const { return socket_.is_encrypted(); }

 private:
  ServedConnection(UniqueFd socket, UniqueFd wake, const Admission& admission)
      : channel_(admission.agreed.channel),
        admission_(admission),
        socket_(std::move(socket)),
        wake_(std::move(wake)) {}
  void run(ServedSession& session, Serve serve);
  bool begin();
  bool encrypt(const FrameKey& key);
  bool spin_receive(std::span<std::byte> out, ssize_t* count);
  bool wait(short events, int timeout_ms);
  bool flush_mail();

  const Channel channel_;
  Admission admission_;
  ConnectionTags tags_;
  SocketStream socket_;
  const UniqueFd wake_;  ///< eventfd, signalled by stop() and post()
  std::atomic<bool> stop_{false};
  std::atomic<bool> finished_{false};

  std::mutex mail_mutex_;
  MessageRing mail_;
  std::atomic<bool> mail_waiting_{false};

  std::atomic<uint64_t> read_count_{0};
  std::atomic<uint64_t> read_bytes_{0};
  std::atomic<uint64_t> final_cpu_ns_{0};
  clockid_t cpu_clock_{};
  uint32_t spin_credit_ = 0;
  uint32_t spin_skipped_ = 0;

  std::thread thread_;
};

}  // namespace vmigrate::transport

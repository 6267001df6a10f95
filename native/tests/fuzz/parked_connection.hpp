#pragma once

#include <memory>
#include <span>
#include <vector>

#include "transport/stream/listener.hpp"

namespace vmigrate::fuzz {

/// What a peer was sent.
struct Replies {
  std::vector<std::byte> bytes;
  size_t descriptor_count = 0;  ///< that came with them, and were closed
};

/// A served connection whose own thread does nothing, so that the calling thread can serve it, with another
/// socket for each input. It is one for the life of the process, because threads and sessions cost more than
/// an input.
class ParkedConnection {
 public:
  /// `prepare` as in StreamService.
  ParkedConnection(Status (*prepare)(transport::ExposedKey& key), transport::MessageHandler handler,
                   void* context);

  transport::ServedSession& session() { return *session_; }
  transport::ServedConnection& connection() { return *connection_; }
  /// Calls `serve` with a peer that has sent `stream` and then closed its side. It arrives in parts that end
  /// at `splits`, which grow.
  Replies serve(std::span<const std::byte> stream, std::span<const size_t> splits,
                transport::ServedConnection::Serve serve);

 private:
  const transport::StreamService service_;
  std::unique_ptr<transport::Listener> listener_;
  std::unique_ptr<transport::ExposedSession> exposed_;
  transport::ServedSession* session_ = nullptr;
  transport::ServedConnection* connection_ = nullptr;
  int socket_number_ = -1;
};

/// Sends on a unix socket so that one receive() gets no more than up to the next of `splits`.
void send_in_parts(int socket, std::span<const std::byte> stream, std::span<const size_t> splits);

}  // namespace vmigrate::fuzz

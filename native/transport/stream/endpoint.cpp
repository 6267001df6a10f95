#include "transport/stream/endpoint.hpp"

#include <sys/socket.h>

#include <cerrno>

#include "base/check.hpp"

namespace vmigrate::transport {

Status StreamEndpoint::open() {
  if (Status opened = ready_.open(); !opened) return opened;
  if (Status watched = ready_.watch(socket_.get()); !watched) return watched;
  update_ready();
  return ok();
}

PostStatus StreamEndpoint::send(std::span<const std::byte> message) {
  VMG_CHECK(!message.empty() && message.size() <= wire::kMessageBytesMax);
  if (!queue_.message_room()) flush();
  if (disconnected_) return PostStatus::kDisconnected;
  if (!queue_.message_room()) return PostStatus::kWouldBlock;
  queue_.push_message(message);
  flush();
  update_ready();
  return PostStatus::kPosted;
}

size_t StreamEndpoint::receive(std::span<std::byte> out) {
  if (received_.empty() && !disconnected_) {
    flush();
    receive_some();
  }
  const auto length_bytes = received_.take(out);
  if (!length_bytes && !disconnected_) disconnect(EMSGSIZE);
  update_ready();
  return length_bytes.value_or(0);
}

void StreamEndpoint::flush_queue() {
  const SendQueue::Outcome outcome = queue_.flush(socket_, *this);
  if (outcome == SendQueue::Outcome::kBroken) return disconnect(errno);
  ready_.want_write(socket_.get(), outcome == SendQueue::Outcome::kBlocked);
}

void StreamEndpoint::disconnect(int system_errno) {
  disconnected_ = true;
  ready_.unwatch(socket_.get());
  // The descriptor stays open as long as this object, but the peer notices at once.
  (void)::shutdown(socket_.get(), SHUT_RDWR);
  queue_.clear();
  table_.disconnect_all(system_errno);
}

}  // namespace vmigrate::transport

#include "transport/stream/send_queue.hpp"

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>

#include "transport/frames.hpp"

namespace vmigrate::transport {
namespace {

constexpr size_t kPartsMax = 16;

/// Collects the pieces of one sendmsg; pieces that are adjacent in memory become one.
class Parts {
 public:
  bool room() const { return count_ < kPartsMax; }
  void add(const void* bytes, size_t length_bytes) {
    if (length_bytes == 0) return;
    if (count_ > 0) {
      iovec& last = parts_[count_ - 1];
      if (static_cast<std::byte*>(last.iov_base) + last.iov_len == bytes) {
        last.iov_len += length_bytes;
        return;
      }
    }
    parts_[count_++] = iovec{const_cast<void*>(bytes), length_bytes};
  }
  msghdr message() {
    msghdr message{};
    message.msg_iov = parts_.data();
    message.msg_iovlen = count_;
    return message;
  }

 private:
  std::array<iovec, kPartsMax + 1> parts_;
  size_t count_ = 0;
};

}  // namespace

void SendQueue::push(const wire::FrameHeader& header, Item item) {
  VMG_CHECK(count_ < kItemsMax);
  const size_t index = (first_ + count_++) % kItemsMax;
  headers_[index] = header;
  items_[index] = item;
}

void SendQueue::push_operation(const wire::FrameHeader& header, uint8_t slot) {
  const bool payload = header.op == static_cast<uint8_t>(wire::FrameOp::kWrite) && header.length != 0;
  push(header, Item{payload ? Kind::kPayload : Kind::kPlain, slot, false});
}

void SendQueue::push_message(std::span<const std::byte> message) {
  messages_.push(message);
  push(message_header(message.size()), Item{Kind::kMessage, 0, true});
}

size_t SendQueue::body_bytes(size_t index) const {
  return items_[index].kind == Kind::kPlain ? 0 : headers_[index].length;
}

SendQueue::Outcome SendQueue::flush(int fd, Owner& owner) {
  while (count_ > 0) {
    Parts parts;
    for (size_t i = 0; i < count_ && parts.room(); ++i) {
      const size_t index = (first_ + i) % kItemsMax;
      Item& item = items_[index];
      // Only the first frame has a payload or a message loaded, one of each at most.
      if (i > 0 && item.kind != Kind::kPlain) break;
      if (item.kind == Kind::kPayload && !item.loaded) {
        if (!owner.load_payload(item.slot, {payload_.get(), headers_[index].length})) {
          pop();
          break;
        }
        item.loaded = true;
      }
      size_t skip_bytes = i == 0 ? first_sent_bytes_ : 0;
      const auto* header = reinterpret_cast<const std::byte*>(&headers_[index]);
      if (skip_bytes < sizeof(wire::FrameHeader)) {
        parts.add(header + skip_bytes, sizeof(wire::FrameHeader) - skip_bytes);
        skip_bytes = 0;
      } else {
        skip_bytes -= sizeof(wire::FrameHeader);
      }
      if (item.kind == Kind::kPlain) continue;
      const std::byte* body = item.kind == Kind::kMessage ? messages_.front().data() : payload_.get();
      parts.add(body + skip_bytes, body_bytes(index) - skip_bytes);
    }
    msghdr message = parts.message();
    if (message.msg_iovlen == 0) continue;
    const ssize_t sent = ::sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN ? Outcome::kBlocked : Outcome::kBroken;
    }
    advance(static_cast<size_t>(sent), owner);
  }
  return Outcome::kEmpty;
}

void SendQueue::advance(size_t sent_bytes, Owner& owner) {
  first_sent_bytes_ += sent_bytes;
  while (count_ > 0) {
    const size_t frame_bytes = sizeof(wire::FrameHeader) + body_bytes(first_);
    if (first_sent_bytes_ < frame_bytes) return;
    first_sent_bytes_ -= frame_bytes;
    const Item item = items_[first_];
    pop();
    if (item.kind != Kind::kMessage) owner.frame_sent(item.slot);
  }
}

void SendQueue::pop() {
  if (items_[first_].kind == Kind::kMessage) messages_.pop();
  first_ = (first_ + 1) % kItemsMax;
  --count_;
}

void SendQueue::clear() {
  while (count_ > 0) pop();
  first_sent_bytes_ = 0;
}

}  // namespace vmigrate::transport

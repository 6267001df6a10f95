#include "transport/stream/send_queue.hpp"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
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
  std::array<iovec, kPartsMax + 2> parts_;
  size_t count_ = 0;
};

}  // namespace

void SendQueue::push(const wire::FrameHeader& header, Item item) {
  VMG_CHECK(count_ < kItemsMax);
  const size_t index = (first_ + count_++) % kItemsMax;
  std::memcpy(head_of(index), &header, sizeof header);
  items_[index] = item;
}

void SendQueue::push_operation(const wire::FrameHeader& header, uint8_t slot) {
  const bool payload = header.op == static_cast<uint8_t>(wire::FrameOp::kWrite) && header.length != 0;
  push(header, Item{payload ? Kind::kPayload : Kind::kPlain, slot, false, payload ? header.length : 0});
}

void SendQueue::push_message(std::span<const std::byte> message) {
  messages_.push(message);
  push(message_header(message.size()), Item{Kind::kMessage, 0, false, static_cast<uint32_t>(message.size())});
}

const std::byte* SendQueue::body_of(size_t index) const {
  return items_[index].kind == Kind::kMessage ? messages_.front().data() : payload_.get();
}

// Loads the body and makes the tag. Tags count the frames, so this is done in the order of sending and only
// for frames that are sent. False: the frame is dropped, or the queue is broken.
bool SendQueue::make_ready(size_t index, Owner& owner) {
  Item& item = items_[index];
  if (item.ready) return true;
  if (item.kind == Kind::kPayload && !owner.load_payload(item.slot, {payload_.get(), item.body_bytes}))
    return false;
  if (tags_ != nullptr) {
    std::byte* head = head_of(index);
    tags_->begin();
    tags_->add({head, sizeof(wire::FrameHeader)});
    if (item.body_bytes > 0) tags_->add({body_of(index), item.body_bytes});
    broken_ |= !tags_->finish(
        std::span<std::byte, wire::kFrameTagBytes>(head + sizeof(wire::FrameHeader), wire::kFrameTagBytes));
  }
  item.ready = true;
  return !broken_;
}

SendQueue::Outcome SendQueue::flush(SocketStream& socket, Owner& owner) {
  while (count_ > 0) {
    Parts parts;
    for (size_t i = 0; i < count_ && parts.room(); ++i) {
      const size_t index = (first_ + i) % kItemsMax;
      const Item& item = items_[index];
      // Only the first frame has a payload or a message loaded, one of each at most.
      if (i > 0 && item.kind != Kind::kPlain) break;
      if (!make_ready(index, owner)) {
        if (!broken_) pop();
        break;
      }
      const std::byte* head = head_of(index);
      const std::span<const std::byte> pieces[] = {
          {head, sizeof(wire::FrameHeader)},
          {item.body_bytes > 0 ? body_of(index) : nullptr, item.body_bytes},
          {head + sizeof(wire::FrameHeader), tag_bytes_}};
      size_t skip_bytes = i == 0 ? first_sent_bytes_ : 0;
      for (const auto& piece : pieces) {
        const size_t skipped_bytes = std::min(skip_bytes, piece.size());
        skip_bytes -= skipped_bytes;
        parts.add(piece.data() + skipped_bytes, piece.size() - skipped_bytes);
      }
    }
    if (broken_) {
      errno = EIO;
      return Outcome::kBroken;
    }
    msghdr message = parts.message();
    if (message.msg_iovlen == 0) continue;
    const ssize_t sent = socket.send(message);
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
    const size_t whole_bytes = frame_bytes(first_);
    if (first_sent_bytes_ < whole_bytes) return;
    first_sent_bytes_ -= whole_bytes;
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

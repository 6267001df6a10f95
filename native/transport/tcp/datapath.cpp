#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.hpp"
#include "transport/frames.hpp"
#include "transport/limits.hpp"
#include "transport/tcp/endpoint.hpp"

namespace vmigrate::transport {

TcpEndpoint::TcpEndpoint(SocketStream socket, ConnectionTags tags)
    : StreamEndpoint(std::move(socket), /*with_payloads=*/true, std::move(tags.sent)),
      staging_(std::make_unique_for_overwrite<std::byte[]>(kStagingBytes)),
      tags_(std::move(tags.received)),
      tag_bytes_(tags_ != nullptr ? wire::kFrameTagBytes : 0) {}

PostResult TcpEndpoint::post(OperationTable::Kind kind, std::span<const Operation> operations) {
  PostResult result;
  if (disconnected_) return {0, PostStatus::kDisconnected};
  for (const Operation& operation : operations) {
    memories_.check(operation);
    if (table_.full()) {
      result.status = PostStatus::kWouldBlock;
      break;
    }
    const uint8_t slot = table_.add(kind, operation);
    wire::FrameHeader header{};
    header.op = static_cast<uint8_t>(kind == OperationTable::Kind::kRead ? wire::FrameOp::kRead
                                                                         : wire::FrameOp::kWrite);
    header.length = operation.length_bytes;
    header.tag = table_.slot(slot).wire_tag;
    header.key = operation.remote.key;
    header.offset = operation.remote_offset_bytes;
    queue_.push_operation(header, slot);
    ++result.posted;
  }
  flush();
  update_ready();
  // Posted operations complete with kDisconnected if this very call found the connection broken.
  return result;
}

size_t TcpEndpoint::poll(std::span<Completion> out) {
  if (!disconnected_) {
    flush();
    receive_some();
  }
  const size_t count = table_.take(out);
  update_ready();
  return count;
}

bool TcpEndpoint::load_payload(uint8_t slot, std::span<std::byte> out) {
  const Operation& operation = table_.slot(slot).operation;
  const AccessResult loaded = memories_.at(operation.local).load(operation.local_offset_bytes, out);
  if (!loaded.ok()) table_.complete(slot, loaded.result, loaded.system_errno);
  return loaded.ok();
}

void TcpEndpoint::frame_sent(uint8_t slot) {
  table_.slot(slot).state = OperationTable::State::kSent;
}

// Reads what has arrived, up to kPollBytesMax. A short recv() means that the socket is empty. Another call
// would only return EAGAIN, and would cost one system call for each page.
void TcpEndpoint::receive_some() {
  parse();  // messages may have waited for room
  size_t moved_bytes = 0;
  while (!disconnected_ && !received_.full() && moved_bytes < kPollBytesMax) {
    const size_t room_bytes = kStagingBytes - staging_end_;
    const ssize_t count = socket_.receive({staging_.get() + staging_end_, room_bytes});
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0) return disconnect(count == 0 ? ECONNRESET : errno);
    staging_end_ += static_cast<size_t>(count);
    moved_bytes += static_cast<size_t>(count);
    parse();
    if (static_cast<size_t>(count) < room_bytes && socket_.is_empty()) return;
  }
}

void TcpEndpoint::parse() {
  bool progress = true;
  while (progress && !disconnected_) {
    switch (expect_) {
      case Expect::kHeader:
        progress = staged_bytes() >= sizeof(wire::FrameHeader);
        if (progress) {
          const wire::FrameHeader header = decode_header(staging_.get() + staging_begin_);
          staging_begin_ += sizeof header;
          if (tags_ != nullptr) {
            tags_->begin();
            tags_->add(std::as_bytes(std::span(&header, 1)));
          }
          if (!accept_header(header)) disconnect(EPROTO);
        }
        break;
      case Expect::kPayload:
        progress = take_payload();
        break;
      case Expect::kOutcome:
        progress = take_outcome();
        break;
      case Expect::kMessage:
        progress = take_message();
        break;
    }
  }
  // The rest is less than a page, a header or a message, or it waits for room for its message.
  if (staging_begin_ == 0) return;
  std::memmove(staging_.get(), staging_.get() + staging_begin_, staged_bytes());
  staging_end_ -= staging_begin_;
  staging_begin_ = 0;
}

bool TcpEndpoint::accept_header(const wire::FrameHeader& header) {
  if (header.op == static_cast<uint8_t>(wire::FrameOp::kMessage)) {
    message_bytes_ = header.length;
    expect_ = Expect::kMessage;
    return valid_message_header(header);
  }
  const bool read_reply = header.op == static_cast<uint8_t>(wire::FrameOp::kReadReply);
  const bool write_reply = header.op == static_cast<uint8_t>(wire::FrameOp::kWriteReply);
  if (!read_reply && !write_reply) return false;
  if (header.reserved != 0 || header.key != 0 || header.offset != 0) return false;
  const int found = table_.find_sent(header.tag);
  if (found < 0) return false;
  const auto slot = static_cast<uint8_t>(found);
  const auto kind = read_reply ? OperationTable::Kind::kRead : OperationTable::Kind::kWrite;
  OpResult result{};
  if (table_.slot(slot).kind != kind || !result_of(header.status, &result)) return false;
  if (write_reply && result == OpResult::kAbsent) return false;

  if (read_reply && result == OpResult::kOk) {
    const uint32_t asked_bytes = table_.slot(slot).operation.length_bytes;
    if (header.length != asked_bytes || asked_bytes == 0) return false;
    reply_slot_ = slot;
    payload_done_ = 0;
    reply_outcome_ = {};
    expect_ = Expect::kPayload;
    return true;
  }
  if (header.length != 0) return false;
  reply_slot_ = slot;
  reply_outcome_ = {result, 0};
  expect_ = Expect::kOutcome;
  return true;
}

// Requires that the tag is staged.
bool TcpEndpoint::tag_is_right() {
  if (tags_ == nullptr) return true;
  const std::span<const std::byte, wire::kFrameTagBytes> tag(staging_.get() + staging_begin_,
                                                             wire::kFrameTagBytes);
  staging_begin_ += wire::kFrameTagBytes;
  if (tags_->matches(tag)) return true;
  disconnect(EBADMSG);
  return false;
}

bool TcpEndpoint::take_outcome() {
  if (staged_bytes() < tag_bytes_ || !tag_is_right()) return false;
  table_.complete(reply_slot_, reply_outcome_.result, reply_outcome_.system_errno);
  expect_ = Expect::kHeader;
  return true;
}

bool TcpEndpoint::take_payload() {
  const Operation& operation = table_.slot(reply_slot_).operation;
  const uint32_t left_bytes = operation.length_bytes - payload_done_;
  const uint64_t local_offset = operation.local_offset_bytes + payload_done_;
  size_t bytes = std::min<size_t>(left_bytes, staged_bytes());
  // The last part of a page waits for the rest, because half of a fresh page would be zeroed first.
  if (bytes < left_bytes) bytes -= std::min<size_t>(bytes, (local_offset + bytes) % wire::kPageBytesMin);
  if (bytes == 0) return false;
  if (tags_ != nullptr) tags_->add({staging_.get() + staging_begin_, bytes});
  if (reply_outcome_.ok()) {
    reply_outcome_ =
        memories_.at(operation.local).store(local_offset, {staging_.get() + staging_begin_, bytes});
  }
  staging_begin_ += bytes;
  payload_done_ += static_cast<uint32_t>(bytes);
  if (payload_done_ == operation.length_bytes) expect_ = Expect::kOutcome;
  return true;
}

bool TcpEndpoint::take_message() {
  if (staged_bytes() < message_bytes_ + tag_bytes_ || received_.full()) return false;
  const std::span<const std::byte> message(staging_.get() + staging_begin_, message_bytes_);
  staging_begin_ += message_bytes_;
  if (tags_ != nullptr) tags_->add(message);
  if (!tag_is_right()) return false;
  received_.push(message);
  expect_ = Expect::kHeader;
  return true;
}

}  // namespace vmigrate::transport

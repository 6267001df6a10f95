#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.hpp"
#include "transport/frames.hpp"
#include "transport/limits.hpp"
#include "transport/shm/endpoint.hpp"

namespace vmigrate::transport {
namespace {

/// A poll() that has completions to return skips the socket. One in this many reads the socket all the same,
/// so that a busy endpoint still notices that its peer is gone.
constexpr uint32_t kPollsWithoutReceiveMax = 32;

}  // namespace

ShmEndpoint::ShmEndpoint(SocketStream socket, ConnectionTags no_tags)
    : StreamEndpoint(std::move(socket), /*with_payloads=*/false, std::move(no_tags.sent)),
      bounce_(std::make_unique_for_overwrite<std::byte[]>(kStoreBytesMax)) {}

PostResult ShmEndpoint::post(OperationTable::Kind kind, std::span<const Operation> operations) {
  PostResult result;
  if (disconnected_) return {0, PostStatus::kDisconnected};
  for (const Operation& operation : operations) {
    memories_.check(operation);
    if (table_.full()) {
      result.status = PostStatus::kWouldBlock;
      break;
    }
    const uint8_t slot = table_.add(kind, operation);
    ++result.posted;
    bool refused = false;
    const Key* key = find_or_ask(operation.remote.key, &refused);
    if (key != nullptr)
      execute(slot, *key);
    else if (refused)
      table_.complete(slot, OpResult::kBadKey, 0);
    else
      ++waiting_count_;
  }
  flush();
  update_ready();
  return result;
}

// nullptr without a refusal: the operation waits until the peer has answered.
ShmEndpoint::Key* ShmEndpoint::find_or_ask(uint64_t key, bool* refused) {
  Key* free_entry = nullptr;
  for (size_t i = 0; i < keys_.size(); ++i) {
    const size_t index = (last_key_ + i) % keys_.size();
    Key& entry = keys_[index];
    if (entry.state == KeyState::kFree) {
      if (free_entry == nullptr) free_entry = &entry;
    } else if (entry.key == key) {
      last_key_ = index;
      return entry.state == KeyState::kOpen ? &entry : nullptr;
    }
  }
  // A session never has more keys than this table holds, so the peer would refuse this key anyway.
  if (free_entry == nullptr) {
    *refused = true;
    return nullptr;
  }
  free_entry->state = KeyState::kAsked;
  free_entry->key = key;
  wire::FrameHeader request{};
  ShmMap map{};
  map.op = static_cast<uint8_t>(ShmOp::kMap);
  map.key = key;
  std::memcpy(&request, &map, sizeof map);
  queue_.push_operation(request, 0);
  return nullptr;
}

void ShmEndpoint::execute(uint8_t slot, const Key& key) {
  const OperationTable::Slot& entry = table_.slot(slot);
  const Operation& operation = entry.operation;
  const MemoryAccess& local = memories_.at(operation.local);
  const std::span bounce(bounce_.get(), kStoreBytesMax);
  const AccessResult outcome =
      entry.kind == OperationTable::Kind::kRead
          ? key.region.read(operation.remote_offset_bytes, local, operation.local_offset_bytes,
                            operation.length_bytes, bounce)
          : key.region.write(operation.remote_offset_bytes, local, operation.local_offset_bytes,
                             operation.length_bytes, bounce);
  table_.complete(slot, outcome.result, outcome.system_errno);
}

// Runs the operations that waited for a key which has arrived, at most as many per call as poll() may move.
void ShmEndpoint::execute_waiting() {
  size_t moved_bytes = 0;
  for (uint8_t i = 0; i < wire::kOutstandingOpsMax && waiting_count_ > 0 && moved_bytes < kPollBytesMax;
       ++i) {
    const OperationTable::Slot& slot = table_.slot(i);
    if (slot.state != OperationTable::State::kPosted) continue;
    bool refused = false;
    const Key* key = find_or_ask(slot.operation.remote.key, &refused);
    if (key == nullptr) continue;
    moved_bytes += slot.operation.length_bytes;
    --waiting_count_;
    execute(i, *key);
  }
}

void ShmEndpoint::finish_waiting(uint64_t key, OpResult result) {
  for (uint8_t i = 0; i < wire::kOutstandingOpsMax; ++i) {
    const OperationTable::Slot& slot = table_.slot(i);
    if (slot.state != OperationTable::State::kPosted || slot.operation.remote.key != key) continue;
    --waiting_count_;
    table_.complete(i, result, 0);
  }
}

size_t ShmEndpoint::poll(std::span<Completion> out) {
  if (!disconnected_) {
    flush();
    if (waiting_count_ > 0 || !table_.has_completions() ||
        ++polls_without_receive_ >= kPollsWithoutReceiveMax) {
      polls_without_receive_ = 0;
      receive_some();
      execute_waiting();
    }
  }
  const size_t count = table_.take(out);
  update_ready();
  return count;
}

void ShmEndpoint::receive_some() {
  parse();  // messages may have waited for room
  while (!disconnected_ && !received_.full()) {
    const size_t room_bytes = staging_.size() - staged_bytes_;
    const ssize_t count = receive_frames({staging_.data() + staged_bytes_, room_bytes});
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0) return disconnect(count == 0 ? ECONNRESET : errno);
    staged_bytes_ += static_cast<size_t>(count);
    parse();
  }
}

// Takes ownership of passed descriptors. More than can belong to frames is an error of the peer; the kernel
// closes those that do not fit.
ssize_t ShmEndpoint::receive_frames(std::span<std::byte> out) {
  alignas(cmsghdr) char control[CMSG_SPACE(kPassedFdsMax * sizeof(int))];
  iovec part{out.data(), out.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t count = ::recvmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (count < 0) return count;
  bool excess = (message.msg_flags & MSG_CTRUNC) != 0;
  for (cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr; head = CMSG_NXTHDR(&message, head)) {
    if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
    const size_t fd_count = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < fd_count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(head) + i * sizeof fd, sizeof fd);
      UniqueFd passed(fd);
      if (passed_fd_count_ == kPassedFdsMax)
        excess = true;
      else
        passed_fds_[passed_fd_count_++] = std::move(passed);
    }
  }
  if (!excess) return count;
  errno = EPROTO;
  return -1;
}

void ShmEndpoint::parse() {
  size_t begin = 0;
  while (!disconnected_ && staged_bytes_ - begin >= sizeof(wire::FrameHeader)) {
    const wire::FrameHeader header = decode_header(staging_.data() + begin);
    if (header.op == static_cast<uint8_t>(ShmOp::kMapReply)) {
      ShmMapReply reply;
      std::memcpy(&reply, &header, sizeof reply);
      begin += sizeof reply;
      if (!accept_map_reply(reply)) disconnect(EPROTO);
    } else if (header.op == static_cast<uint8_t>(wire::FrameOp::kMessage) && valid_message_header(header)) {
      if (staged_bytes_ - begin < sizeof header + header.length || received_.full()) break;
      received_.push({staging_.data() + begin + sizeof header, header.length});
      begin += sizeof header + header.length;
    } else {
      disconnect(EPROTO);
    }
  }
  staged_bytes_ -= begin;
  std::memmove(staging_.data(), staging_.data() + begin, staged_bytes_);
}

bool ShmEndpoint::accept_map_reply(const ShmMapReply& reply) {
  for (const uint8_t byte : reply.reserved) {
    if (byte != 0) return false;
  }
  const uint64_t wanted = reply.key;
  const auto entry = std::find_if(keys_.begin(), keys_.end(), [wanted](const Key& key) {
    return key.state == KeyState::kAsked && key.key == wanted;
  });
  OpResult result{};
  if (entry == keys_.end() || !result_of(reply.status, &result) || result == OpResult::kAbsent) return false;
  if (result != OpResult::kOk) {
    entry->state = KeyState::kFree;
    finish_waiting(entry->key, result);
    return true;
  }
  if (passed_fd_count_ == 0) return false;
  UniqueFd file = std::move(passed_fds_[0]);
  std::move(passed_fds_.begin() + 1, passed_fds_.begin() + static_cast<ptrdiff_t>(passed_fd_count_),
            passed_fds_.begin());
  --passed_fd_count_;
  if (!entry->region.open(std::move(file), reply)) return false;
  entry->state = KeyState::kOpen;
  return true;
}

// The next poll() continues operations whose key has arrived. While a key's reply is outstanding, the socket
// announces it.
bool ShmEndpoint::can_move_on() const {
  if (waiting_count_ == 0 || disconnected_) return false;
  return std::any_of(keys_.begin(), keys_.end(), [this](const Key& key) {
    if (key.state != KeyState::kOpen) return false;
    for (uint8_t i = 0; i < wire::kOutstandingOpsMax; ++i) {
      const OperationTable::Slot& slot = table_.slot(i);
      if (slot.state == OperationTable::State::kPosted && slot.operation.remote.key == key.key) return true;
    }
    return false;
  });
}

}  // namespace vmigrate::transport

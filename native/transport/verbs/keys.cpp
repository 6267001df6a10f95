#include "transport/verbs/keys.hpp"

#include <algorithm>

#include "transport/frames.hpp"

namespace vmigrate::transport {

OpResult RemoteKeys::Entry::check(const Operation& operation, bool write) const {
  if (write && access != Access::kReadWrite) return OpResult::kNotAllowed;
  const uint64_t length = operation.length_bytes;
  if (length == 0 || length > chunks.length_bytes ||
      operation.remote_offset_bytes > chunks.length_bytes - length)
    return OpResult::kOutOfRange;
  return OpResult::kOk;
}

RemoteKeys::Entry* RemoteKeys::find_or_add(uint64_t key) {
  Entry* free_entry = nullptr;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const size_t index = (last_ + i) % entries_.size();
    Entry& entry = entries_[index];
    if (entry.state == State::kFree) {
      if (free_entry == nullptr) free_entry = &entry;
    } else if (entry.key == key) {
      last_ = index;
      return &entry;
    }
  }
  if (free_entry != nullptr) {
    free_entry->state = State::kUnasked;
    free_entry->key = key;
  }
  return free_entry;
}

RemoteKeys::Entry* RemoteKeys::next_unasked() {
  const auto entry = std::find_if(entries_.begin(), entries_.end(),
                                  [](const Entry& candidate) { return candidate.state == State::kUnasked; });
  return entry == entries_.end() ? nullptr : &*entry;
}

RemoteKeys::Entry* RemoteKeys::accept(std::span<const std::byte> frame, OpResult* result) {
  VerbsMapReply reply;
  if (frame.size() < sizeof reply) return nullptr;
  std::memcpy(&reply, frame.data(), sizeof reply);
  const uint64_t key = reply.key;
  const auto entry = std::find_if(entries_.begin(), entries_.end(), [key](const Entry& candidate) {
    return candidate.state == State::kAsked && candidate.key == key;
  });
  if (entry == entries_.end() || !result_of(reply.status, result) || reply.reserved != 0) return nullptr;
  if (*result == OpResult::kAbsent) return nullptr;
  if (*result != OpResult::kOk) {
    if (frame.size() != sizeof reply) return nullptr;
    entry->state = State::kFree;
    return &*entry;
  }

  const auto access = static_cast<Access>(reply.access);
  if (access != Access::kRead && access != Access::kReadWrite) return nullptr;
  uint64_t end = 0;
  if (reply.length == 0 || __builtin_add_overflow(uint64_t{reply.address}, uint64_t{reply.length}, &end))
    return nullptr;
  // Together with the count this bounds every index that is computed from an offset inside the region.
  if (reply.chunk_bytes < wire::kTransferBytesMax || reply.chunk_count > kChunksMax ||
      reply.chunk_count != (reply.length - 1) / reply.chunk_bytes + 1)
    return nullptr;
  if (frame.size() != sizeof reply + reply.chunk_count * sizeof(uint32_t)) return nullptr;
  entry->access = access;
  entry->chunks = {reply.address, reply.length, reply.chunk_bytes, std::vector<uint32_t>(reply.chunk_count)};
  std::memcpy(entry->chunks.keys.data(), frame.data() + sizeof reply, frame.size() - sizeof reply);
  entry->state = State::kOpen;
  return &*entry;
}

}  // namespace vmigrate::transport

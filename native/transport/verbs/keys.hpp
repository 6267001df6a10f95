#pragma once

#include <array>
#include <cstring>
#include <span>

#include "transport/limits.hpp"
#include "transport/verbs/frames.hpp"
#include "transport/verbs/memory.hpp"

namespace vmigrate::transport {

/// The requester's knowledge of the peer's keys. Their number is fixed, and each is asked for once. Not
/// thread-safe.
class RemoteKeys {
 public:
  enum class State : uint8_t {
    kFree = 0,
    kUnasked,  ///< operations wait; the request waits for a send buffer
    kAsked,    ///< operations wait for the answer
    kOpen,
  };
  struct Entry {
    State state = State::kFree;
    uint64_t key = 0;
    Access access = Access::kRead;
    ChunkedKeys chunks;

    /// Whether the peer's device would refuse the operation, which would also end the queue pair.
    OpResult check(const Operation& operation, bool write) const;
  };

  /// The key's entry, or a new entry in kUnasked. nullptr: there are more keys than a session can have, so
  /// the peer has no such key.
  Entry* find_or_add(uint64_t key);
  /// An entry whose key must still be asked for; nullptr: none.
  Entry* next_unasked();
  /// Takes the peer's answer. nullptr: it answers no request of ours, or is inconsistent. Otherwise the entry
  /// it was about. If `result` is not kOk, that entry is free again, but its `key` can still be read.
  Entry* accept(std::span<const std::byte> frame, OpResult* result);

 private:
  std::array<Entry, kKeysMax> entries_;
  size_t last_ = 0;  ///< where the last search ended; most operations go to the same region
};

}  // namespace vmigrate::transport

#pragma once

#include <array>
#include <cstring>
#include <span>

#include "transport/limits.hpp"
#include "transport/verbs/frames.hpp"
#include "transport/verbs/memory.hpp"

namespace vmigrate::transport {

/// What a requester knows of the peer's keys: a fixed number, each asked for once. Not thread-safe.
class RemoteKeys {
 public:
  enum class State : uint8_t {
    kFree = 0,
    kUnasked,  ///< operations wait; the question waits for a send buffer
    kAsked,    ///< operations wait for the answer
    kOpen,
  };
  struct Entry {
    State state = State::kFree;
    uint64_t key = 0;
    Access access = Access::kRead;
    ChunkedKeys chunks;

    /// What the peer's device would refuse, and with the queue pair be lost.
    OpResult check(const Operation& operation, bool write) const;
  };

  /// Its entry, or a fresh one in kUnasked; nullptr: more keys than a session can have, so it has no such.
  Entry* find_or_add(uint64_t key);
  /// An entry that is still to be asked for; nullptr: none.
  Entry* next_unasked();
  /// Takes the peer's answer in. nullptr: it answers nothing that we asked, or is inconsistent. Otherwise the
  /// entry it was about; with `result` other than kOk that is free again, its `key` left to be read.
  Entry* accept(std::span<const std::byte> frame, OpResult* result);

 private:
  std::array<Entry, kKeysMax> entries_;
  size_t last_ = 0;  ///< where the last search ended; most go to the same region
};

}  // namespace vmigrate::transport

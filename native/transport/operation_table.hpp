#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

#include "base/check.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// Operations of one endpoint, from post until their completion is returned to the owner. Fixed size: the
/// slots in use and the waiting completions together never exceed wire::kOutstandingOpsMax. Not thread-safe.
class OperationTable {
 public:
  enum class Kind : uint8_t { kRead = 1, kWrite };
  enum class State : uint8_t {
    kFree = 0,
    kPosted,  ///< not yet (completely) sent to the peer
    kSent,    ///< the peer may answer
  };
  struct Slot {
    Operation operation;
    uint64_t wire_tag = 0;
    Kind kind = Kind::kRead;
    State state = State::kFree;
  };

  OperationTable() {
    for (uint8_t i = 0; i < wire::kOutstandingOpsMax; ++i)
      free_[i] = static_cast<uint8_t>(wire::kOutstandingOpsMax - 1 - i);
  }

  bool full() const { return outstanding_ == wire::kOutstandingOpsMax; }
  bool has_completions() const { return completion_count_ != 0; }

  /// The table must not be full. The slot's index stays the same until complete().
  uint8_t add(Kind kind, const Operation& operation) {
    VMG_CHECK(!full());
    const uint8_t index = free_[--free_count_];
    // The low byte is the slot's index. The rest distinguishes this operation from earlier ones in the same
    // slot.
    slots_[index] = Slot{operation, ++generation_ << 8 | index, kind, State::kPosted};
    ++outstanding_;
    return index;
  }
  Slot& slot(uint8_t index) { return slots_[index]; }
  const Slot& slot(uint8_t index) const { return slots_[index]; }
  /// The index of the sent operation that has the tag the peer returned; -1: there is none.
  int find_sent(uint64_t wire_tag) const {
    const uint64_t index = wire_tag & 0xff;
    if (index >= slots_.size()) return -1;
    const Slot& slot = slots_[index];
    return slot.state == State::kSent && slot.wire_tag == wire_tag ? static_cast<int>(index) : -1;
  }
  void complete(uint8_t index, OpResult result, int system_errno) {
    Slot& slot = slots_[index];
    VMG_CHECK(slot.state != State::kFree);
    slot.state = State::kFree;
    free_[free_count_++] = index;
    completions_[(completion_first_ + completion_count_++) % completions_.size()] =
        Completion{slot.operation.tag, result, system_errno};
  }
  void disconnect_all(int system_errno) {
    for (uint8_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].state != State::kFree) complete(i, OpResult::kDisconnected, system_errno);
    }
  }
  size_t take(std::span<Completion> out) {
    const size_t count = std::min(out.size(), completion_count_);
    for (size_t i = 0; i < count; ++i) out[i] = completions_[(completion_first_ + i) % completions_.size()];
    completion_first_ = (completion_first_ + count) % completions_.size();
    completion_count_ -= count;
    outstanding_ -= count;
    return count;
  }

 private:
  std::array<Slot, wire::kOutstandingOpsMax> slots_;
  std::array<uint8_t, wire::kOutstandingOpsMax> free_{};
  size_t free_count_ = wire::kOutstandingOpsMax;
  std::array<Completion, wire::kOutstandingOpsMax> completions_;
  size_t completion_first_ = 0;
  size_t completion_count_ = 0;
  size_t outstanding_ = 0;
  uint64_t generation_ = 0;
};

static_assert(wire::kOutstandingOpsMax <= 256, "a slot's index fits the tag's low byte");

}  // namespace vmigrate::transport

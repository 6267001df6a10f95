#pragma once

#include <array>
#include <cstdint>

#include "multicast/datagram/limits.hpp"

namespace vmigrate::multicast {

/// Which sequences of one sender have been seen: tells repeated datagrams from new ones. One thread.
class SequenceWindow {
 public:
  /// False: it was here before, or is too old to tell.
  bool note(uint64_t sequence) {
    if (sequence > highest_) {
      const uint64_t passed = sequence - highest_;
      if (passed >= kReorderedMax) seen_.fill(0);
      for (uint64_t i = 1; i <= passed && passed < kReorderedMax; ++i)
        word_of(highest_ + i) &= ~bit_of(highest_ + i);
      highest_ = sequence;
    } else if (highest_ - sequence >= kReorderedMax || (word_of(sequence) & bit_of(sequence)) != 0) {
      return false;
    }
    word_of(sequence) |= bit_of(sequence);
    return true;
  }
  uint64_t highest() const { return highest_; }

 private:
  uint64_t& word_of(uint64_t sequence) { return seen_[sequence / 64 % seen_.size()]; }
  static uint64_t bit_of(uint64_t sequence) { return uint64_t{1} << (sequence % 64); }

  static_assert(kReorderedMax % 64 == 0);
  std::array<uint64_t, kReorderedMax / 64> seen_{};
  uint64_t highest_ = 0;
};

}  // namespace vmigrate::multicast

#pragma once

#include <algorithm>
#include <array>
#include <chrono>

#include "transport/hello.hpp"

namespace vmigrate::transport {

/// Challenges whose answer comes with another connection request. Each is good for one answer and for
/// wire::kHelloTimeoutMs. The table is fixed; the oldest gives way. One thread.
class ChallengeTable {
 public:
  using Clock = std::chrono::steady_clock;

  /// The challenge of a first hello.
  const Transcript& add(const wire::Hello& hello, Clock::time_point now) {
    const auto oldest =
        std::min_element(entries_.begin(), entries_.end(),
                         [](const Entry& a, const Entry& b) { return a.deadline < b.deadline; });
    *oldest = {{hello, random_nonce()}, now + std::chrono::milliseconds(wire::kHelloTimeoutMs)};
    return oldest->transcript;
  }
  /// Calls `is_right` with the challenges of this hello until it returns true, and forgets that one. A
  /// stranger may send a first hello that he has seen, so there can be several; and a wrong answer uses none
  /// up.
  template <typename IsRight>
  bool take(const wire::Hello& second, Clock::time_point now, IsRight is_right) {
    for (Entry& entry : entries_) {
      if (entry.deadline <= now || !is_same_hello(entry.transcript.hello, second)) continue;
      if (!is_right(entry.transcript)) continue;
      entry = {};
      return true;
    }
    return false;
  }

 private:
  struct Entry {
    Transcript transcript;
    Clock::time_point deadline{};
  };
  std::array<Entry, wire::kHelloPendingMax> entries_;
};

}  // namespace vmigrate::transport

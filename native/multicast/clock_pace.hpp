#pragma once

#include <algorithm>
#include <cstdint>

namespace vmigrate::multicast {

/// When the next bytes may be sent, at a rate that changes. Whoever is late may catch up a little.
class ClockPace {
 public:
  explicit ClockPace(uint64_t catch_up_ns) : catch_up_ns_(catch_up_ns) {}
  bool is_due(uint64_t at_ns) const { return at_ns >= next_ns_; }
  uint64_t next_ns() const { return next_ns_; }
  /// So many bytes are sent now.
  void note(uint64_t bytes, uint64_t bytes_per_s, uint64_t at_ns) {
    const uint64_t from_ns = std::max(next_ns_, at_ns > catch_up_ns_ ? at_ns - catch_up_ns_ : 0);
    // A batch is less than 2^16 bytes: no overflow.
    next_ns_ = from_ns + bytes * 1'000'000'000u / std::max<uint64_t>(1, bytes_per_s);
  }

 private:
  const uint64_t catch_up_ns_;
  uint64_t next_ns_ = 0;
};

}  // namespace vmigrate::multicast

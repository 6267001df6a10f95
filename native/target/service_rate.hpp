#pragma once

#include <cstdint>

namespace vmigrate::pager {

/// How fast the link carries what bulk asks for: bytes that came over the time in which something was under
/// way, averaged over the last few windows. One thread's.
class ServiceRate {
 public:
  /// Something is under way from now on; before, nothing was.
  void begin(uint64_t at_ns) { from_ns_ = at_ns; }
  /// `bytes` of it have come since the last call, and something may be under way still.
  void note(uint64_t bytes, uint64_t at_ns) {
    window_bytes_ += bytes;
    window_ns_ += at_ns - from_ns_;
    from_ns_ = at_ns;
    if (window_ns_ < kWindowNs) return;
    const uint64_t seen = window_bytes_ * 1'000'000'000u / window_ns_;
    bytes_per_s_ = bytes_per_s_ == 0 ? seen : (3 * bytes_per_s_ + seen) / 4;
    window_bytes_ = window_ns_ = 0;
  }
  /// What comes within `duration_ns` (at most a second); UINT64_MAX while nothing is known.
  uint64_t bytes_within(uint64_t duration_ns) const {
    return bytes_per_s_ == 0 ? UINT64_MAX : bytes_per_s_ * (duration_ns / 1000) / 1'000'000u;
  }

 private:
  /// Long enough for some transfers of the smallest size on a slow link, short against a drain.
  static constexpr uint64_t kWindowNs = 5'000'000;

  uint64_t from_ns_ = 0;
  uint64_t window_bytes_ = 0;
  uint64_t window_ns_ = 0;
  uint64_t bytes_per_s_ = 0;
};

}  // namespace vmigrate::pager

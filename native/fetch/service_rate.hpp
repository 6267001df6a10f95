#pragma once

#include <cstdint>

namespace vmigrate::pager {

/// The rate at which the link delivers bulk's requests: received bytes divided by the time in which requests
/// were outstanding, averaged over the last few windows. For use by one thread.
class ServiceRate {
 public:
  /// Call it when a request becomes outstanding after none was.
  void begin(uint64_t at_ns) { from_ns_ = at_ns; }
  /// Records that `bytes` have arrived since the last call. Requests may still be outstanding.
  void note(uint64_t bytes, uint64_t at_ns) {
    window_bytes_ += bytes;
    window_ns_ += at_ns - from_ns_;
    from_ns_ = at_ns;
    if (window_ns_ < kWindowNs) return;
    const uint64_t seen = window_bytes_ * 1'000'000'000u / window_ns_;
    bytes_per_s_ = bytes_per_s_ == 0 ? seen : (3 * bytes_per_s_ + seen) / 4;
    window_bytes_ = window_ns_ = 0;
  }
  /// Bytes that arrive within `duration_ns` (at most a second); UINT64_MAX while the rate is unknown.
  uint64_t bytes_within(uint64_t duration_ns) const {
    return bytes_per_s_ == 0 ? UINT64_MAX : bytes_per_s_ * (duration_ns / 1000) / 1'000'000u;
  }

 private:
  /// Long enough for some transfers of the smallest size on a slow link, short compared with a drain.
  static constexpr uint64_t kWindowNs = 5'000'000;

  uint64_t from_ns_ = 0;
  uint64_t window_bytes_ = 0;
  uint64_t window_ns_ = 0;
  uint64_t bytes_per_s_ = 0;
};

}  // namespace vmigrate::pager

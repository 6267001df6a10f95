#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "transport/limits.hpp"

namespace vmigrate::transport {

/// Whether to look again at once instead of sleeping until the device interrupts. Looking costs a core for up
/// to kSpinNs, so it goes on only where that paid lately: each success earns credit, each failure halves it,
/// and without credit one wait in a few is tried all the same, to notice that answers come fast once more.
class AdaptiveSpin {
 public:
  explicit AdaptiveSpin(bool enabled) : enabled_(enabled) {}

  /// Nothing has come so far. True: look again.
  bool go_on() {
    if (!enabled_ || failed_) return false;
    if (!spinning_) {
      if (credit_ == 0 && ++skipped_ < kProbeInterval) {
        failed_ = true;
        return false;
      }
      skipped_ = 0;
      spinning_ = true;
      end_ = Clock::now() + std::chrono::nanoseconds(kSpinNs);
      return true;
    }
    if (Clock::now() < end_) return true;
    spinning_ = false;
    failed_ = true;
    credit_ /= 2;
    return false;
  }
  /// Something has come, or there is nothing to wait for.
  void succeed() {
    if (spinning_) credit_ = std::min(credit_ + 1, kCreditMax);
    spinning_ = false;
    failed_ = false;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr uint32_t kCreditMax = 16;
  static constexpr uint32_t kProbeInterval = 16;

  const bool enabled_;
  bool spinning_ = false;
  bool failed_ = false;  ///< during this wait: it sleeps from now on
  uint32_t credit_ = kCreditMax;
  uint32_t skipped_ = 0;
  Clock::time_point end_;
};

}  // namespace vmigrate::transport

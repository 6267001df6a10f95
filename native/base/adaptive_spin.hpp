#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace vmigrate {

/// Decides whether to poll a device again at once instead of sleeping until it interrupts. Polling costs a
/// core for up to kSpinNs, so it is done only if it succeeded lately: each success earns credit, and each
/// failure halves the credit. Without credit one wait in a few still polls, to notice that answers come fast
/// again. For use by one thread.
class AdaptiveSpin {
 public:
  /// Call it when nothing has arrived so far. True: poll again.
  bool go_on() {
    if (failed_) return false;
    if (!spinning_) {
      if (credit_ == 0 && ++skipped_ < kProbeInterval) {
        failed_ = true;
        return false;
      }
      skipped_ = 0;
      spinning_ = true;
      end_ = Clock::now() + kSpin;
      return true;
    }
    if (Clock::now() < end_) return true;
    spinning_ = false;
    failed_ = true;
    credit_ /= 2;
    return false;
  }
  /// Call it when something has arrived or there is nothing to wait for.
  void succeed() {
    if (spinning_) credit_ = std::min(credit_ + 1, kCreditMax);
    spinning_ = false;
    failed_ = false;
  }

 private:
  using Clock = std::chrono::steady_clock;
  /// A card answers within some microseconds, a software device within a tenth of a millisecond or two.
  static constexpr std::chrono::microseconds kSpin{250};
  static constexpr uint32_t kCreditMax = 16;
  static constexpr uint32_t kProbeInterval = 16;

  bool spinning_ = false;
  bool failed_ = false;  ///< during this wait; it sleeps from now on
  uint32_t credit_ = kCreditMax;
  uint32_t skipped_ = 0;
  Clock::time_point end_;
};

}  // namespace vmigrate

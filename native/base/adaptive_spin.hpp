#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace vmigrate {

/// Whether to look again at once for what a device is to answer, instead of sleeping until it interrupts.
/// Looking costs a core for up to kSpinNs, so it goes on only where that paid lately: each success earns
/// credit, each failure halves it, and without credit one wait in a few is tried all the same, to notice that
/// answers come fast once more. One thread's.
class AdaptiveSpin {
 public:
  /// Nothing has come so far. True: look again.
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
  /// Something has come, or there is nothing to wait for.
  void succeed() {
    if (spinning_) credit_ = std::min(credit_ + 1, kCreditMax);
    spinning_ = false;
    failed_ = false;
  }

 private:
  using Clock = std::chrono::steady_clock;
  /// A card answers within some microseconds, a device in software within a tenth of a millisecond or two.
  static constexpr std::chrono::microseconds kSpin{250};
  static constexpr uint32_t kCreditMax = 16;
  static constexpr uint32_t kProbeInterval = 16;

  bool spinning_ = false;
  bool failed_ = false;  ///< during this wait: it sleeps from now on
  uint32_t credit_ = kCreditMax;
  uint32_t skipped_ = 0;
  Clock::time_point end_;
};

}  // namespace vmigrate

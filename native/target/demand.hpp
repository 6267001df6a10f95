#pragma once

#include <array>
#include <cstdint>

#include "base/adaptive_spin.hpp"
#include "base/unique_fd.hpp"
#include "base/watcher.hpp"
#include "fetch/demand_lane.hpp"
#include "target/core.hpp"
#include "target/publish.hpp"

namespace vmigrate::pager {

/// The thread that reads the VM's faults, fetches pages that a vCPU waits for, and at the end unregisters the
/// ranges. No other thread reads the userfaultfds. run() is the thread's whole life; the object dies after
/// it.
class DemandThread final : private Watcher {
 public:
  explicit DemandThread(TargetCore& core);
  /// Call it before run(), on any thread.
  Status open();
  void run();

 private:
  Status watch(int fd, uint32_t tag) override;
  void unwatch(int fd) override;
  bool poll_some();
  bool read_faults();
  void serve(PageKey key, uint64_t read_ns);
  bool wait_for_claim(PageKey key, uint64_t read_ns);
  bool room_for_faults(size_t& count_max) const;
  void pause_reading(bool paused);
  void sleep();
  void finish();

  TargetCore& core_;
  Publisher publisher_;
  DemandLane lane_;
  std::vector<uint32_t> descriptors_;  ///< indices of the userfaultfds to read
  size_t first_descriptor_ = 0;        ///< read first next time, so that no descriptor starves another
  UniqueFd epoll_;
  bool reading_paused_ = false;

  // Busy polling: how long to look for work before sleeping. The time grows while polling finds work and
  // shrinks while it does not.
  uint64_t spin_ns_ = kSpinNsMin;
  static constexpr uint64_t kSpinNsMin = 2'000;
  static constexpr uint64_t kSpinNsMax = 100'000;
  AdaptiveSpin device_spin_;  ///< used while a device has a READ of ours
  static constexpr int kPollsPerLook = 8;
};

}  // namespace vmigrate::pager
